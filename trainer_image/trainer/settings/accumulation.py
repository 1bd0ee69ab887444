"""How an update's windows divide into micro-batches and processes."""

from __future__ import annotations

from trainer.runtime.errors import UsageError
from trainer.settings.config import AUTO
from trainer.settings.layers import Resolved


def accumulation(resolved: Resolved, world_size: int) -> int:
    """Micro-batches per update on each process; `AUTO` where ``micro_batch`` is yet to be found.

    ``grad_accum`` wins where given; else it is ``global_batch / (micro_batch × world_size)``.

    Raises:
        UsageError: the division leaves a remainder, or both were given and disagree.
    """
    config = resolved.config
    if config.micro_batch == AUTO:
        _check_auto(resolved, world_size)
        return AUTO
    per_pass = config.micro_batch * world_size
    shown = f"micro_batch {config.micro_batch} x {world_size} process{'es' * (world_size > 1)}"
    if config.grad_accum is not None:
        implied = config.grad_accum * per_pass
        if resolved.given("global_batch") and config.global_batch != implied:
            raise UsageError(
                f"--grad_accum={config.grad_accum} x {shown} is {implied} windows per update, but"
                f" --global_batch={config.global_batch}; leave one of them out"
            )
        return config.grad_accum
    if config.global_batch % per_pass:
        raise UsageError(
            f"--global_batch={config.global_batch} is not divisible by {shown}; change one of them"
            " or give --grad_accum"
        )
    return config.global_batch // per_pass


def _check_auto(resolved: Resolved, world_size: int) -> None:
    config = resolved.config
    if config.grad_accum is not None and not resolved.given("grad_accum"):
        raise UsageError(
            "--micro_batch=auto follows from --global_batch, of which the checkpoint tells only"
            f" grad_accum {config.grad_accum}; give --global_batch"
        )
    if config.grad_accum is not None:
        raise UsageError(
            f"--micro_batch=auto follows from --global_batch; leave out --grad_accum"
            f"={config.grad_accum}, or give a number for --micro_batch"
        )
    if config.global_batch % world_size:
        raise UsageError(
            f"--global_batch={config.global_batch} is not divisible by {world_size} processes;"
            " change it"
        )
    if world_size > 1 and (config.parallel == "fsdp" or config.shard_teacher):
        raise UsageError(
            "--micro_batch=auto works where each process holds the whole model, not with"
            " --parallel=fsdp or --shard_teacher; give a number"
        )
