"""How an update's windows divide into micro-batches and processes."""

from __future__ import annotations

from trainer.runtime.errors import UsageError
from trainer.settings.config import AUTO
from trainer.settings.layers import CHECKPOINT, DEFAULT, DERIVED, Resolved


def with_accumulation(resolved: Resolved, world_size: int) -> Resolved:
    """With ``grad_accum`` and ``global_batch`` as they follow from each other.

    Where the global batch is a checkpoint's and the micro-batch the default, the latter becomes its
    largest divisor up to the default. With ``micro_batch`` `AUTO`, ``grad_accum`` stays None.

    Raises:
        UsageError: see `accumulation`.
    """
    resolved = _with_fitting_micro_batch(resolved, world_size)
    steps = accumulation(resolved, world_size)
    if steps == AUTO:
        return resolved
    windows = steps * resolved.values["micro_batch"] * world_size
    derived = {
        name: value
        for name, value in (("grad_accum", steps), ("global_batch", windows))
        if resolved.sources[name] == DEFAULT or resolved.values[name] != value
    }
    return resolved.changed(derived, DERIVED)


def _with_fitting_micro_batch(resolved: Resolved, world_size: int) -> Resolved:
    values, sources = resolved.values, resolved.sources
    windows, rest = divmod(values["global_batch"], world_size)
    chosen = (sources["micro_batch"], sources["global_batch"]) != (DEFAULT, CHECKPOINT)
    if chosen or values["grad_accum"] is not None or rest:
        return resolved
    fitting = max(n for n in range(1, values["micro_batch"] + 1) if windows % n == 0)
    if fitting == values["micro_batch"]:
        return resolved
    return resolved.changed({"micro_batch": fitting}, DERIVED)


def accumulation(resolved: Resolved, world_size: int) -> int:
    """Micro-batches per update on each process; `AUTO` where ``micro_batch`` is yet to be found.

    ``grad_accum`` wins where given; else it is ``global_batch / (micro_batch × world_size)``.

    Raises:
        UsageError: the division leaves a remainder, or both were given and disagree.
    """
    micro_batch, grad_accum, global_batch = (
        resolved.values[name] for name in ("micro_batch", "grad_accum", "global_batch")
    )
    if micro_batch == AUTO:
        _check_auto(resolved, world_size)
        return AUTO
    per_pass = micro_batch * world_size
    shown = f"micro_batch {micro_batch} x {world_size} process{'es' * (world_size > 1)}"
    if grad_accum is not None:
        implied = grad_accum * per_pass
        if resolved.given("global_batch") and global_batch != implied:
            raise UsageError(
                f"--grad_accum={grad_accum} x {shown} is {implied} windows per update, but"
                f" --global_batch={global_batch}; leave one of them out"
            )
        return int(grad_accum)
    if global_batch % per_pass:
        raise UsageError(
            f"--global_batch={global_batch} is not divisible by {shown}; change one of them"
            " or give --grad_accum"
        )
    return int(global_batch // per_pass)


def _check_auto(resolved: Resolved, world_size: int) -> None:
    values = resolved.values
    grad_accum, global_batch = values["grad_accum"], values["global_batch"]
    if grad_accum is not None and not resolved.given("grad_accum"):
        raise UsageError(
            "--micro_batch=auto follows from --global_batch, of which the checkpoint tells only"
            f" grad_accum {grad_accum}; give --global_batch"
        )
    if grad_accum is not None:
        raise UsageError(
            f"--micro_batch=auto follows from --global_batch; leave out --grad_accum={grad_accum},"
            " or give a number for --micro_batch"
        )
    if global_batch % world_size:
        raise UsageError(
            f"--global_batch={global_batch} is not divisible by {world_size} processes; change it"
        )
    if world_size > 1 and (values["parallel"] == "fsdp" or values["shard_teacher"]):
        raise UsageError(
            "--micro_batch=auto works where each process holds the whole model, not with"
            " --parallel=fsdp or --shard_teacher; give a number"
        )
