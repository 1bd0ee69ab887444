"""Where a run starts: from scratch, from another run's checkpoint, or from its own snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import compiled_of, origin_of, tokens_of
from trainer.models.positions import resize_positions
from trainer.models.student import Student, StudentConfig
from trainer.runtime.errors import CheckpointError, DataError, ModelError, UsageError
from trainer.runtime.log import log
from trainer.settings.layers import Resolved


@dataclass
class Start:
    """The state that training goes on from."""

    student: Student
    step: int
    trained_positions: int
    optimizer_state: dict[str, dict[str, Any]] = field(default_factory=dict)
    """AdamW moments by parameter name; empty for a fresh optimizer."""
    trainer_state: dict[str, Any] = field(default_factory=dict)
    """Best metric, skipped updates, loss scale; empty at the start of a phase."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Checkpoint, step and context that the phase came from; empty from scratch."""
    stretched: bool | None = False
    """Whether the phase began by stretching the position table; None where nothing tells."""
    source: str = ""
    """Where the state was read from; empty from scratch."""
    compiled: str | None = None
    """SHA-256 of the run's compiled code; None at the start of a phase, and where none is kept."""
    tokens: str | None = None
    """Fingerprint of the tokens that the run must go on with; None at the start of a phase."""


def from_scratch(resolved: Resolved, vocab_size: int) -> Start:
    """A freshly initialized student whose table has one row per position of the context."""
    config = resolved.config
    if resolved.given("trained_positions"):
        raise UsageError(
            f"--trained_positions={config.trained_positions} is of a checkpoint's table; give"
            " --resume_gcs_uri, or leave it out"
        )
    absolute = config.pos_embedding == "absolute"
    student_config = StudentConfig(
        vocab_size=vocab_size,
        d_model=config.d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        positions=config.context if absolute else 0,
        pos_embedding=config.pos_embedding,
        rope_scale=config.rope_scale,
        dropout=config.dropout,
    )
    student = Student(student_config).initialize(config.seed)
    log.info("student from scratch, seed %d", config.seed)
    return Start(student, step=0, trained_positions=config.context)


def from_own_snapshot(resolved: Resolved, checkpoint: Checkpoint) -> Start:
    """The run's own newest snapshot, continued exactly."""
    student = Student(_student_config(resolved, checkpoint))
    student.load_state_dict(checkpoint.weights, strict=True)
    log.info("going on from own snapshot %s at step %d", checkpoint.source, checkpoint.step)
    return Start(
        student,
        step=checkpoint.step,
        trained_positions=checkpoint.trained_positions() or resolved.config.context,
        optimizer_state=checkpoint.optimizer_by_name(),
        trainer_state=checkpoint.trainer_state,
        origin=checkpoint.meta.get("origin") or {},
        stretched=None,
        source=checkpoint.source,
        compiled=compiled_of(checkpoint.meta),
        tokens=tokens_of(checkpoint.meta),
    )


def new_phase(resolved: Resolved, checkpoint: Checkpoint) -> Start:
    """Another run's checkpoint: its step is kept only if it lies below ``train_steps``.

    A learned table that is too short for the context is stretched from its trained rows, and so
    are its moments where the optimizer is kept.
    """
    config = resolved.config
    student_config = _student_config(resolved, checkpoint)
    trained = checkpoint.trained_positions(config.trained_positions)
    if trained is None and student_config.positions:
        trained = min(student_config.positions, config.context)
        log.warning(
            "%s does not tell how many of its %d position rows were trained; assuming %d. Give"
            " --trained_positions if it was trained at another context",
            checkpoint.source,
            student_config.positions,
            trained,
        )
    old_context = _old_context(resolved, checkpoint)
    reset = _resets(resolved, checkpoint)
    optimizer_state = {} if reset else checkpoint.optimizer_by_name()
    step = checkpoint.step
    if reset:
        step = 0
        words = "context %s -> %s: step 0, fresh optimizer and schedules"
        log.info(words, old_context, config.block_size)
    elif restarts(resolved, checkpoint):
        log.info(
            "checkpoint step %d is not below train_steps %d: a new phase, step, learning rate and"
            " schedules start at 0; optimizer moments are %s",
            step,
            config.train_steps,
            "kept" if optimizer_state else "not in the checkpoint",
        )
        step = 0
    elif config.train_steps:
        log.info("starting from %s at step %d", checkpoint.source, step)
    else:
        words = (
            "%s is at step %d; a run keeps that if it is below its --train_steps, else starts at 0"
        )
        log.info(words, checkpoint.source, step)
    if trained is not None and config.context > trained:
        _stretch_moments(optimizer_state, trained, config.context, config.pos_resize)
    weights, student_config = stretched_student(
        checkpoint.weights, student_config, trained, config.context, config.pos_resize
    )
    student = Student(student_config)
    student.load_state_dict(weights, strict=True)
    return Start(
        student,
        step=step,
        trained_positions=max(trained or 0, config.context),
        optimizer_state=optimizer_state,
        origin=origin_of(checkpoint, old_context),
        stretched=trained is not None and config.context > trained,
        source=checkpoint.source,
    )


def _old_context(resolved: Resolved, checkpoint: Checkpoint) -> int | None:
    """The context a checkpoint was trained at, in tokens; None where nothing tells."""
    given = resolved.values["trained_positions"]
    return checkpoint.context or checkpoint.trained_positions(given)


def _resets(resolved: Resolved, checkpoint: Checkpoint) -> bool:
    """Whether ``--reset_optim_on_ctx_change`` applies."""
    old = _old_context(resolved, checkpoint)
    changed = old is not None and old != resolved.values["block_size"]
    return resolved.values["reset_optim_on_ctx_change"] and changed


def restarts(resolved: Resolved, checkpoint: Checkpoint) -> bool:
    """Whether a new phase counts its steps from 0 instead of from the checkpoint's.

    With ``--train_steps=0`` the number of updates is not known, so neither is this.
    """
    behind = 0 < resolved.values["train_steps"] <= checkpoint.step
    return _resets(resolved, checkpoint) or behind


def stretched_student(
    weights: Mapping[str, Tensor],
    config: StudentConfig,
    trained: int | None,
    context: int,
    method: str,
) -> tuple[dict[str, Tensor], StudentConfig]:
    """Weights and shapes for a context; a table with enough trained rows stays as it is.

    Args:
        weights: a student's state dict.
        config: its shapes.
        trained: trained rows of its table, None for a rotary student.
        context: positions needed.
        method: see `resize_positions`.
    """
    stretched = dict(weights)
    if trained is None or context <= trained:
        return stretched, config
    words = "position table: %d rows, %d of them trained, stretched to %d (%s)"
    log.info(words, config.positions, trained, context, method)
    stretched["pos.weight"] = resize_positions(weights["pos.weight"], trained, context, method)
    return stretched, replace(config, positions=context)


def _stretch_moments(
    optimizer_state: Mapping[str, dict[str, Any]], trained: int, length: int, method: str
) -> None:
    moments = optimizer_state.get("pos.weight", {})
    for key in ("exp_avg", "exp_avg_sq"):
        if isinstance(moments.get(key), Tensor):
            moments[key] = resize_positions(moments[key], trained, length, method)


def _student_config(resolved: Resolved, checkpoint: Checkpoint) -> StudentConfig:
    """The checkpoint's shapes; a flag that contradicts them is an error, not a wish."""
    config = resolved.config
    shapes = checkpoint.student_config(config.n_heads if resolved.given("n_heads") else None)
    for name in ("d_model", "n_layers", "pos_embedding"):
        given, actual = getattr(config, name), getattr(shapes, name)
        if resolved.given(name) and given != actual:
            raise UsageError(
                f"--{name}={given}: the checkpoint {checkpoint.source} has {actual}; leave it out"
            )
    if resolved.given("rope_scale") and config.rope_scale != 1.0 and shapes.positions:
        raise UsageError(
            f"--rope_scale={config.rope_scale:g}: the checkpoint {checkpoint.source} has learned"
            " positions; leave it out"
        )
    return replace(shapes, rope_scale=config.rope_scale, dropout=config.dropout)


def check_tokens(start: Start, fingerprint: str) -> None:
    """A run goes on with its own tokens: the same settings may name data that has changed.

    Raises:
        DataError: the token streams have another fingerprint.
    """
    if start.tokens is not None and start.tokens != fingerprint:
        raise DataError(
            f"{start.source} was trained on other tokens (fingerprint {start.tokens}, now"
            f" {fingerprint}): the data set or its tokenizer has changed; give the tokens it was"
            " trained on, or another --output_gcs_uri or --local_workdir"
        )


def check_vocabularies(
    student_vocab: int, tokenizer_vocab: int | None, teacher_vocab: int | None, source: str
) -> None:
    """Every token id needs a row in the student, every student row one in the teacher.

    Raises:
        ModelError: the vocabularies cannot be aligned.
        CheckpointError: the checkpoint was trained with a smaller vocabulary.
    """
    if tokenizer_vocab is not None and student_vocab < tokenizer_vocab:
        raise CheckpointError(
            f"{source} has a vocabulary of {student_vocab}, the tokenizer one of {tokenizer_vocab};"
            " give the teacher whose tokenizer the student was trained with"
        )
    if teacher_vocab is not None and teacher_vocab < student_vocab:
        raise ModelError(
            f"the teacher's vocabulary of {teacher_vocab} is smaller than the student's of"
            f" {student_vocab}; they cannot be aligned, give a teacher with the same tokenizer"
        )
