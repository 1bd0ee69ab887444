"""Tensors and modules spread over processes: DDP and FSDP2.

A process that has not imported torch's packages for that, which takes a while, has none of them.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from trainer.runtime.processes import Processes

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_sharded(value: Tensor) -> TypeGuard[DTensor]:
    """Whether each process holds a part of the tensor."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(value, package.DTensor)


def is_sharded_module(module: nn.Module) -> TypeGuard[FSDPModule]:
    """Whether FSDP2 has spread the module's parameters."""
    package = sys.modules.get("torch.distributed.fsdp")
    return package is not None and isinstance(module, package.FSDPModule)


def full_tensor(value: Tensor) -> Tensor:
    """A sharded tensor gathered on every process; any other as it is."""
    return value.full_tensor() if is_sharded(value) else value


def local_tensor(value: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return value.to_local() if is_sharded(value) else value


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the parameter's device, sharded as the parameter is."""
    value = value.to(parameter.device, parameter.dtype)
    if is_sharded(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def wrap(module: nn.Module, processes: Processes, scheme: str) -> nn.Module:
    """The module with its gradients averaged over processes.

    Args:
        module: on this process's device, in fp32.
        processes: this process among the others.
        scheme: ``ddp`` (Li et al., 2020, arXiv:2006.15704) keeps a replica on each; ``fsdp``
            shards parameters, gradients and moments (FSDP2).
    """
    if scheme == "fsdp" and processes.world_size > 1:
        from torch.distributed.fsdp import fully_shard

        student = module.get_submodule("student")
        for block in student.get_submodule("blocks").children():
            fully_shard(block)
        fully_shard(student)
        return module
    if processes.world_size == 1:
        return module
    return nn.parallel.DistributedDataParallel(
        module,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )
