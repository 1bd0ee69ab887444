"""Checks of the tensors in a checkpoint that may be damaged or hostile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.metadata import is_number
from trainer.runtime.errors import CheckpointError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def is_held(tensor: Tensor) -> bool:
    """Whether a tensor has values, and has them on the CPU."""
    # map_location leaves tensors of the meta device, which have no values, where they are
    return tensor.device.type == "cpu"


def _check_dense(tensor: Tensor, name: str) -> None:
    if tensor.is_nested or tensor.dtype not in _FLOATS or tensor.layout != torch.strided:
        raise CheckpointError(f"{name} is a {tensor.dtype} tensor, not a dense float one")
    if not is_held(tensor):
        raise CheckpointError(f"{name} has a shape but no values")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{name} claims more elements than it holds")
    # Training copies them to fp32, where a large fp64 value is infinite
    if not bool(torch.isfinite(tensor.float()).all()):
        raise CheckpointError(f"{name} has values that are not finite")


def check_weights(weights: Mapping[str, Tensor], source: str, size: int) -> None:
    """Refuse weights that are not dense, finite and held by a file of ``size`` bytes.

    Raises:
        CheckpointError: naming the parameter and what is wrong with it.
    """
    for name, tensor in weights.items():
        _check_dense(tensor, f"{source}: {name}")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    # The output head may share the embedding's memory; nothing else may share any
    if claimed > 2 * size:
        raise CheckpointError(
            f"{source} is refused: its weights are {claimed} bytes in {size} bytes of file"
        )


def check_moments(entry: Mapping[str, Any], name: str) -> None:
    """Check AdamW's state of one parameter: its count of updates, first and second moment.

    Raises:
        CheckpointError: ``name`` and the entry, and what is wrong with it.
    """
    for key, value in entry.items():
        if isinstance(value, Tensor):
            _check_dense(value, f"{name}: {key}")
            lowest = float(value.min()) if value.numel() else 0.0
        elif is_number(value):
            lowest = float(value)
        else:
            raise CheckpointError(f"{name}: {key} is a {type(value).__name__}, not a number")
        if key in ("step", "exp_avg_sq") and not 0 <= lowest < math.inf:
            raise CheckpointError(f"{name}: {key} is {lowest:g}, which cannot be")
