"""Checks of the tensors in a checkpoint that may be damaged or hostile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.fields import is_number
from trainer.runtime.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ENTRIES = 8
"""Of an optimizer's state of one parameter; AdamW's has 3 or 4."""


def _lowest(tensor: Tensor, name: str) -> float:
    """The least element of a tensor (0 where it has none), after a check that it is a weight's."""
    if tensor.is_nested or tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a {tensor.dtype} tensor, not a dense float one")
    # map_location leaves tensors of the meta device where they are
    if tensor.device.type != "cpu":
        raise CheckpointError(f"{name} has a shape but no values")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims more elements than it holds")
    if not tensor.numel():
        return 0.0
    # No copy is made, and NaN is the least and the greatest. Training copies them to fp32, where
    # a large fp64 value is infinite
    ends = torch.stack(torch.aminmax(tensor.detach())).float()
    if not bool(torch.isfinite(ends).all()):
        raise CheckpointError(f"{name} has values that are not finite")
    return float(ends[0])


def check_weights(weights: Mapping[str, Tensor], source: str, size: int) -> None:
    """Refuse weights that are not dense, finite and held by a file of ``size`` bytes.

    Raises:
        CheckpointError: naming the parameter and what is wrong with it.
    """
    # First, since each is looked through. The output head may share the embedding's memory;
    # nothing else may share any
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    if claimed > 2 * size:
        raise CheckpointError(
            f"{source} is refused: its weights are {claimed} bytes in {size} bytes of file"
        )
    for name, tensor in weights.items():
        _lowest(tensor, f"{source}: {name}")


def check_moments(entry: Mapping[str, Any], name: str, elements: int) -> None:
    """Check AdamW's state of one parameter: its count of updates, first and second moment.

    Args:
        entry: the state.
        name: what messages call it.
        elements: of the parameter.

    Raises:
        CheckpointError: ``name`` and the entry, and what is wrong with it.
    """
    if len(entry) > _ENTRIES:
        raise CheckpointError(f"{name} has {len(entry)} entries; AdamW's has 3 or 4")
    for key, value in entry.items():
        if isinstance(value, Tensor):
            if value.numel() > max(elements, 1):
                raise CheckpointError(
                    f"{name}: {key} has {value.numel()} elements for a parameter of {elements}"
                )
            lowest = _lowest(value, f"{name}: {key}")
        elif is_number(value):
            lowest = float(value)
        else:
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__}, not a number")
        if key in ("step", "exp_avg_sq") and not 0 <= lowest < math.inf:
            raise CheckpointError(f"{name}: {key} is {lowest:g}, which cannot be")
