"""AdamW over named parameters, and its state from checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoints.tensor_checks import is_finite
from trainer.runtime.errors import CheckpointError
from trainer.runtime.sharding import is_sharded, like_parameter
from trainer.settings.config import TrainConfig


def build_optimizer(student: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019); weight decay on parameters of two or more dimensions."""
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.peak_lr,
        betas=config.betas,
        eps=config.eps,
        # With sharded parameters, fused AdamW has no found_inf to skip an update by
        fused=parameters[0].device.type == "cuda" and not is_sharded(parameters[0]),
    )


def parameter_names(optimizer: torch.optim.Optimizer, student: nn.Module) -> list[str]:
    """Names of the parameters in the order of the optimizer's state."""
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def load_state_by_name(
    optimizer: torch.optim.Optimizer, student: nn.Module, state: Mapping[str, Mapping[str, Any]]
) -> None:
    """Load the moments of ``state`` into the optimizer; hyperparameters stay as they are.

    Raises:
        CheckpointError: a moment is missing, not finite, or of another shape than its parameter.
    """
    names = parameter_names(optimizer, student)
    missing = [name for name in names if name not in state]
    if missing:
        raise CheckpointError(
            f"the optimizer state lacks {len(missing)} parameters: {missing[0]} …"
        )
    parameters = dict(student.named_parameters())
    for name in names:
        for key in ("exp_avg", "exp_avg_sq"):
            moment, expected = state[name].get(key), parameters[name].shape
            if not isinstance(moment, Tensor) or moment.shape != expected:
                actual = list(moment.shape) if isinstance(moment, Tensor) else moment
                raise CheckpointError(
                    f"optimizer state {key} of {name} has shape {actual}, not {list(expected)}"
                )
            if not is_finite(moment):
                raise CheckpointError(f"optimizer state {key} of {name} is not finite")
    current = optimizer.state_dict()
    entries = {
        index: {
            "step": torch.as_tensor(state[name].get("step", 0), dtype=torch.float32),
            "exp_avg": like_parameter(state[name]["exp_avg"], parameters[name]),
            "exp_avg_sq": like_parameter(state[name]["exp_avg_sq"], parameters[name]),
        }
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict({"state": entries, "param_groups": current["param_groups"]})
