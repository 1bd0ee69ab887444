"""Stretching a learned position table to a longer context.

The settings take their choices from `RESIZE_METHODS`, so importing this module must not import
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from trainer.runtime.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def _interpolate(rows: Tensor, length: int) -> Tensor:
    """Linear interpolation between the rows; the first and the last stay first and last."""
    import torch.nn.functional as F

    columns = rows.detach().T.double()[None]
    stretched = F.interpolate(columns, size=length, mode="linear", align_corners=True)
    return stretched[0].T.to(rows.dtype).contiguous()


def _tile(rows: Tensor, length: int) -> Tensor:
    """The rows again and again (Longformer: Beltagy et al., 2020, arXiv:2004.05150)."""
    import torch

    return rows[torch.arange(length, device=rows.device) % len(rows)]


RESIZE_METHODS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "linear": _interpolate,
    "copy": _tile,
}
"""By the names that ``--pos_resize`` takes: the trained rows ``[n, D]`` and a length above n to a
table ``[length, D]`` of the same dtype, on the same device."""


def resize_positions(table: Tensor, trained: int, length: int, method: str = "linear") -> Tensor:
    """A table of ``length`` rows made from the ``trained`` first rows of ``table``.

    Rows past ``trained`` hold only what initialization and weight decay made of them, so they are
    not used, however long the table is.

    Args:
        table: ``[rows, D]``.
        trained: how many rows were trained; 1 … rows.
        length: rows of the result.
        method: a name of `RESIZE_METHODS`.

    Returns:
        ``[length, D]`` in the dtype of ``table``; a view of its first rows where
        ``length ≤ trained``.

    Raises:
        UsageError: an unknown method, or counts out of range.
    """
    if method not in RESIZE_METHODS:
        raise UsageError(f"--pos_resize={method!r}: choose one of {', '.join(RESIZE_METHODS)}")
    if not 1 <= trained <= table.shape[0]:
        raise UsageError(
            f"{trained} trained positions in a table of {table.shape[0]} rows: it must be between 1"
            " and the rows; correct --trained_positions"
        )
    if length < 1:
        raise UsageError(f"a position table of {length} rows is not possible; give at least 1")
    if length <= trained:
        return table[:length]
    return RESIZE_METHODS[method](table[:trained], length)
