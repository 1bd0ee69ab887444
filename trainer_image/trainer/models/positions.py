"""Stretching a learned position table to a longer context."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.runtime.errors import UsageError

RESIZE_METHODS = ("linear", "copy")


def resize_positions(table: Tensor, trained: int, length: int, method: str = "linear") -> Tensor:
    """A table of ``length`` rows made from the ``trained`` first rows of ``table``.

    Rows past ``trained`` hold whatever initialization and weight decay left there, so they take
    no part, however long the table is.

    Args:
        table: ``[rows, D]``.
        trained: how many rows were trained; 1 … rows.
        length: rows of the result.
        method: ``linear`` interpolates between the trained rows with both ends kept in place;
            ``copy`` tiles them, as Longformer did (Beltagy et al., 2020, arXiv:2004.05150).

    Returns:
        ``[length, D]`` in the dtype of ``table``; a view of its rows where ``length ≤ trained``
        and nothing has to be made up.

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
    rows = table[:trained]
    if method == "copy":
        return rows[torch.arange(length, device=table.device) % trained]
    if trained == 1:
        return rows.expand(length, -1).clone()
    columns = rows.detach().T.double()[None]
    stretched = F.interpolate(columns, size=length, mode="linear", align_corners=True)
    return stretched[0].T.to(table.dtype).contiguous()
