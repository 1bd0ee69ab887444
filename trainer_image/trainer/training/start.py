"""Where a run starts: from scratch, from another run's checkpoint, or from its own snapshot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import heads_of, tokens_of
from trainer.models.positions import resize_positions
from trainer.models.student import Student, StudentConfig
from trainer.runtime.errors import CheckpointError, DataError, ModelError, UsageError
from trainer.runtime.log import log
from trainer.settings.config import TrainConfig
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
    source: str = ""
    """Where the state was read from; empty from scratch."""
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
    student_config = _student_config(resolved, checkpoint)
    student = Student(student_config)
    student.load_state_dict(checkpoint.weights, strict=True)
    log.info("going on from own snapshot %s at step %d", checkpoint.source, checkpoint.step)
    return Start(
        student,
        step=checkpoint.step,
        trained_positions=checkpoint.trained_positions() or resolved.config.context,
        optimizer_state=checkpoint.optimizer_by_name(),
        trainer_state=checkpoint.trainer_state,
        origin=checkpoint.meta.get("origin") or {},
        source=checkpoint.source,
        tokens=tokens_of(checkpoint.meta),
    )


def new_phase(resolved: Resolved, checkpoint: Checkpoint) -> Start:
    """Another run's checkpoint: its step is kept only if it lies below ``train_steps``.

    A learned table that is too short for the context is stretched from its trained rows, and so
    are its moments where the optimizer is kept.
    """
    config = resolved.config
    student_config = _student_config(resolved, checkpoint)
    trained = _trained_positions(resolved, checkpoint)
    old_context = _old_context(resolved, checkpoint)
    reset = _resets(resolved, checkpoint)
    optimizer_state = {} if reset else checkpoint.optimizer_by_name()
    step = checkpoint.step
    if reset:
        step = 0
        log.info(
            "context %s -> %s: step 0, fresh optimizer and schedules",
            old_context,
            config.block_size,
        )
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
        log.info(
            "%s is at step %d; a run keeps that if it is below its --train_steps, else starts at 0",
            checkpoint.source,
            step,
        )
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
        origin={
            "checkpoint": checkpoint.source,
            "step": checkpoint.step,
            "block_size": old_context,
            "metrics": checkpoint.meta.get("metrics") or {},
        },
        source=checkpoint.source,
    )


def _old_context(resolved: Resolved, checkpoint: Checkpoint) -> int | None:
    """The context a checkpoint was trained at, in tokens; None where nothing tells."""
    asked = resolved.config.trained_positions
    return checkpoint.meta.get("block_size") or trained_rows(checkpoint, asked)


def _resets(resolved: Resolved, checkpoint: Checkpoint) -> bool:
    """Whether ``--reset_optim_on_ctx_change`` applies."""
    old = _old_context(resolved, checkpoint)
    changed = old is not None and old != resolved.config.block_size
    return resolved.config.reset_optim_on_ctx_change and changed


def restarts(resolved: Resolved, checkpoint: Checkpoint) -> bool:
    """Whether a new phase counts its steps from 0 instead of from the checkpoint's.

    With ``--train_steps=0`` the number of updates is not known, so neither is this.
    """
    behind = 0 < resolved.config.train_steps <= checkpoint.step
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
    log.info(
        "position table: %d rows, %d of them trained, stretched to %d (%s)",
        config.positions,
        trained,
        context,
        method,
    )
    stretched["pos.weight"] = resize_positions(weights["pos.weight"], trained, context, method)
    return stretched, replace(config, positions=context)


def _stretch_moments(
    optimizer_state: Mapping[str, dict[str, Any]], trained: int, length: int, method: str
) -> None:
    moments = optimizer_state.get("pos.weight", {})
    for key in ("exp_avg", "exp_avg_sq"):
        if isinstance(moments.get(key), Tensor):
            moments[key] = resize_positions(moments[key], trained, length, method)


def trained_rows(checkpoint: Checkpoint, asked: int | None) -> int | None:
    """Trained rows of a checkpoint's position table.

    Args:
        checkpoint: as read.
        asked: ``--trained_positions``, which wins over what the checkpoint tells.

    Returns:
        The rows; None for a rotary student, and where nothing tells.

    Raises:
        UsageError: the table has no such number of rows.
    """
    table = checkpoint.weights.get("pos.weight")
    if asked is None:
        return None if table is None else checkpoint.trained_positions()
    if table is None:
        raise UsageError(
            f"--trained_positions={asked}: {checkpoint.source} has rotary positions, no table;"
            " leave it out"
        )
    if not 1 <= asked <= table.shape[0]:
        raise UsageError(
            f"--trained_positions={asked}: the table of {checkpoint.source} has"
            f" {table.shape[0]} rows; give 1 to {table.shape[0]}"
        )
    return asked


def known_trained_rows(checkpoint: Checkpoint, asked: int | None) -> int | None:
    """As `trained_rows`, where guessing would be wrong; None for a rotary student.

    Raises:
        UsageError: the table has no such number of rows.
        CheckpointError: nothing tells how many rows were trained.
    """
    trained = trained_rows(checkpoint, asked)
    if trained is None and "pos.weight" in checkpoint.weights:
        raise CheckpointError(
            f"{checkpoint.source} does not tell how many of its"
            f" {checkpoint.weights['pos.weight'].shape[0]} position rows were trained; give"
            " --trained_positions"
        )
    return trained


def _trained_positions(resolved: Resolved, checkpoint: Checkpoint) -> int | None:
    """Trained rows of the table, assumed where nothing tells; None for a rotary student."""
    found = trained_rows(checkpoint, resolved.config.trained_positions)
    if found is None and "pos.weight" in checkpoint.weights:
        rows = checkpoint.weights["pos.weight"].shape[0]
        found = min(rows, resolved.config.context)
        log.warning(
            "%s does not tell how many of its %d position rows were trained; assuming %d. Give"
            " --trained_positions if it was trained at another context",
            checkpoint.source,
            rows,
            found,
        )
    return found


def _student_config(resolved: Resolved, checkpoint: Checkpoint) -> StudentConfig:
    """Shapes from the weights; a flag that contradicts them is an error, not a wish."""
    config = resolved.config
    _check_heads(checkpoint, config.n_heads if resolved.given("n_heads") else None)
    found = _shapes(
        checkpoint,
        n_heads=config.n_heads,
        rope_scale=config.rope_scale,
        dropout=config.dropout,
    )
    for name in ("d_model", "n_layers", "pos_embedding"):
        asked, has = getattr(config, name), getattr(found, name)
        if resolved.given(name) and asked != has:
            raise UsageError(
                f"--{name}={asked}: the checkpoint {checkpoint.source} has {has}; leave it out"
            )
    if resolved.given("rope_scale") and config.rope_scale != 1.0 and found.positions:
        raise UsageError(
            f"--rope_scale={config.rope_scale:g}: the checkpoint {checkpoint.source} has learned"
            " positions; leave it out"
        )
    return found


def student_config(checkpoint: Checkpoint, n_heads: int | None = None) -> StudentConfig:
    """A checkpoint's own shapes: what its weights do not tell is in its metadata.

    Args:
        checkpoint: as read.
        n_heads: attention heads where the metadata does not tell; default is that of the setting.

    Raises:
        UsageError: the checkpoint has other heads.
        CheckpointError: the weights are not a student's, or the metadata has values that no run
            can have.
    """
    _check_heads(checkpoint, n_heads)
    told = checkpoint.settings()
    default = TrainConfig()
    return _shapes(
        checkpoint,
        n_heads=n_heads or told.get("n_heads", default.n_heads),
        rope_scale=told.get("rope_scale", default.rope_scale),
        dropout=told.get("dropout", default.dropout),
    )


def _check_heads(checkpoint: Checkpoint, asked: int | None) -> None:
    heads = heads_of(checkpoint.meta)
    if asked is not None and asked < 1:
        raise UsageError(f"--n_heads={asked} must be at least 1")
    if asked is not None and heads is not None and asked != heads:
        raise UsageError(
            f"--n_heads={asked}: the checkpoint {checkpoint.source} has {heads}; leave it out"
        )


def _shapes(
    checkpoint: Checkpoint, *, n_heads: int, rope_scale: float, dropout: float
) -> StudentConfig:
    """Shapes that a student can be made of."""
    found = checkpoint.student_config(n_heads=n_heads, rope_scale=rope_scale, dropout=dropout)
    if found.pos_embedding == "rotary" and found.d_model // n_heads % 2:
        raise CheckpointError(
            f"{checkpoint.source}: rotary positions need an even head width, not {found.d_model}/"
            f"{n_heads} = {found.d_model // n_heads}; give --n_heads"
        )
    return found


def check_tokens(start: Start, found: str) -> None:
    """A run goes on with its own tokens: the same settings may name data that has changed.

    Raises:
        DataError: the token streams of fingerprint ``found`` are others.
    """
    if start.tokens is not None and start.tokens != found:
        raise DataError(
            f"{start.source} was trained on other tokens (fingerprint {start.tokens}, now {found}):"
            " the data set or its tokenizer has changed; give the tokens it was trained on, or"
            " another --output_gcs_uri or --local_workdir"
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
