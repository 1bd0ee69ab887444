"""A student's blocks under the names that a stock architecture has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


def with_blocks(
    others: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    layers: str,
    names: Mapping[str, str],
    convert: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Weights outside the blocks, which have their new names, and those of all blocks.

    Args:
        others: the former.
        weights: the student's.
        layers: how the new names begin, up to a block's number.
        names: by the beginning of a name within a block, what stands for it.
        convert: of such a beginning and a tensor ``[…]``, the tensor as the architecture keeps it.

    Returns:
        Copies of their own.
    """
    renamed = dict(others)
    for name, tensor in weights.items():
        if not name.startswith("blocks."):
            continue
        _, layer, rest = name.split(".", 2)
        ours = next(prefix for prefix in names if rest.startswith(prefix))
        renamed[f"{layers}.{layer}.{rest.replace(ours, names[ours], 1)}"] = convert(ours, tensor)
    return {name: tensor.contiguous().clone() for name, tensor in renamed.items()}
