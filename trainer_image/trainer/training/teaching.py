"""What a run is taught by: a teacher, its stored targets, or neither, alpha being 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.data.batches import evaluation_batches
from trainer.data.streams import TokenStreams
from trainer.models.teacher import Teacher, TeacherSpec, load_teacher, read_teacher_spec
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log, log_values
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.settings.layers import DERIVED, Resolved
from trainer.targets.checks import check_settings, check_target_tokens, check_teacher
from trainer.targets.reading import Targets
from trainer.targets.shards import Index, read_index
from trainer.training.precision import Precision

_FP8_TOKENS = 8192
"""Of the validation split, to compare an fp8 teacher with its original on."""


def with_targets(resolved: Resolved) -> tuple[Resolved, Index | None]:
    """The index of ``--teacher_targets``, and the settings with the teacher that it names.

    The index is None without targets, and where no update needs them.

    Raises:
        DataError: there are no targets, or their index is damaged.
        StorageError: it cannot be read.
    """
    uri = resolved.values["teacher_targets"]
    if not uri:
        return resolved, None
    index = read_index(uri)
    if not resolved.values["teacher_name"]:
        resolved = resolved.changed({"teacher_name": index.made.teacher}, DERIVED)
    return resolved, index if resolved.config.needs_teacher else None


def check_targets(index: Index, resolved: Resolved, token: str | None) -> None:
    """Compare targets with the settings of a run, and with the teacher that the user names.

    Raises:
        UsageError: naming both sides of what differs.
    """
    config = resolved.config
    check_settings(index.made, config)
    if resolved.given("teacher_name"):
        check_teacher(index.made, config.pretrained, token)


def teacher_spec(config: TrainConfig, token: str | None) -> TeacherSpec | None:
    """The teacher's description, None where no update needs it.

    Raises:
        UsageError: the training context is longer than the teacher's.
    """
    if not config.needs_teacher:
        return None
    spec = read_teacher_spec(config.pretrained, token)
    if spec.max_context is not None and config.context > spec.max_context:
        raise UsageError(
            f"--block_size={config.context} is over the {spec.max_context} positions of teacher"
            f" {spec.name!r}; give a smaller one"
        )
    return spec


def load_teaching(
    source: TeacherSpec | Index | None,
    config: TrainConfig,
    streams: TokenStreams,
    precision: Precision,
    token: str | None,
    processes: Processes,
    before_compiling: Callable[[], None],
) -> tuple[Teacher | None, Targets | None]:
    """The teacher on its device, or the targets in place of it, or neither.

    ``before_compiling`` is called once the weights are loaded, and in any case.

    Raises:
        ModelError: the teacher cannot be loaded, or has no fp8 form though that is asked for.
        DataError: the targets are of other tokens, or a file of them is missing or damaged.
        StorageError: the targets cannot be read.
    """
    if isinstance(source, TeacherSpec):
        sharded = config.shard_teacher and processes.world_size > 1
        teacher = prepared_teacher(
            config, source, streams, precision, token, before_compiling, sharded=sharded
        )
        return teacher, None
    before_compiling()
    if source is None:
        log.info("alpha is 0 throughout: the teacher is not loaded")
        return None, None
    check_target_tokens(source.made, streams.info)
    log.info("in place of the teacher: its targets at %s", config.teacher_targets)
    return None, Targets(
        source,
        config.context,
        config.eval_max_tokens,
        Path(config.local_workdir),
        copying=processes.local_rank == 0,
    )


def prepared_teacher(
    config: TrainConfig,
    spec: TeacherSpec,
    streams: TokenStreams,
    precision: Precision,
    token: str | None,
    before_compiling: Callable[[], None] = lambda: None,
    *,
    sharded: bool = False,
) -> Teacher:
    """The teacher on its device, as fast as the settings make it.

    ``before_compiling`` is called once the weights are loaded.

    Raises:
        ModelError: it cannot be loaded, or has no fp8 form though that is asked for.
    """
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device, token=token)
    before_compiling()
    if precision.fp8_teacher:
        _quantize(teacher, streams, config)
    else:
        teacher.prepare(compiled=precision.compiles(config), sharded=sharded)
    return teacher


def _quantize(teacher: Teacher, streams: TokenStreams, config: TrainConfig) -> None:
    """Turn the teacher to fp8, and say what that changes on the first validation windows."""
    windows = max(1, min(_FP8_TOKENS, len(streams.validation) - 1) // config.context)
    inputs, _ = next(
        iter(evaluation_batches(streams.validation, context=config.context, batch=windows))
    )
    error = teacher.quantize(inputs.to(teacher.device))
    log_values(
        f"teacher in fp8: KL to bf16 {error.divergence:.4f} nats a token, same first choice for"
        f" {error.same_choice:.1%} of {inputs.numel()} tokens, hidden state off by"
        f" {error.hidden:.1%}",
        fp8_divergence=error.divergence,
        fp8_same_choice=error.same_choice,
        fp8_hidden_error=error.hidden,
    )
