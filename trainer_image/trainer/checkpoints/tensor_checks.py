"""Checks of the tensors in a checkpoint that may be damaged or hostile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.fields import is_name, is_number
from trainer.runtime.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_LARGEST = torch.finfo(torch.float32).max
"""What training keeps them in."""

_PIECE = 1 << 22
"""Elements looked through at a time: in fp32, looking copies those of other types."""

_ENTRIES = 8
"""Of an optimizer's state of one parameter; AdamW's has 3 or 4."""


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is infinite or NaN.

    Both ends of the range tell, as NaN is passed on; on a CPU, `torch.isfinite` takes twenty times
    as long.
    """
    if not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_nested or tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a {tensor.dtype} tensor, not a dense float one")
    # map_location leaves tensors of the meta device where they are
    if tensor.device.type != "cpu":
        raise CheckpointError(f"{name} has a shape but no values")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims more elements than it holds")
    # Training copies them to fp32, where a large fp64 value is infinite
    for piece in tensor.detach().reshape(-1).split(_PIECE):
        if not is_finite(piece.float()):
            raise CheckpointError(f"{name} has values that are not finite")


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
        _check_dense(tensor, f"{source}: {name}")


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
    if not all(map(is_name, entry)):
        raise CheckpointError(f"{name} has an entry whose name is none")
    for key, value in entry.items():
        if isinstance(value, Tensor):
            if value.numel() > max(elements, 1):
                raise CheckpointError(
                    f"{name}: {key} has {value.numel()} elements for a parameter of {elements}"
                )
            _check_dense(value, f"{name}: {key}")
            lowest = float(value.min()) if value.numel() else 0.0
        elif is_number(value):
            lowest = float(value)
        else:
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__}, not a number")
        if not abs(lowest) <= _LARGEST or (key in ("step", "exp_avg_sq") and lowest < 0):
            raise CheckpointError(f"{name}: {key} is {lowest:g}, which cannot be")
