"""Whether targets are those of a training: each difference in one line, before anything heavy."""

from __future__ import annotations

from trainer.data.streams import TokenInfo
from trainer.models.pretrained import Pretrained
from trainer.models.teacher import BY_NAME, teacher_digest
from trainer.runtime.errors import DataError, LiquidError, ModelError, UsageError
from trainer.settings.config import TrainConfig
from trainer.targets.shards import MadeWith


def check_settings(made: MadeWith, config: TrainConfig) -> None:
    """Compare targets with a training's contexts and temperatures.

    Raises:
        UsageError: naming both sides of what differs.
    """
    where = f"--teacher_targets={config.teacher_targets}"
    if made.teacher_context % config.context:
        raise UsageError(
            f"--block_size={config.context} does not divide the teacher's context of"
            f" {made.teacher_context} tokens that {where} were made with; give one that does"
        )
    missing = sorted(_temperatures(config) - set(made.temperatures))
    if missing:
        wanted, there = (", ".join(f"{t:g}" for t in some) for some in (missing, made.temperatures))
        raise UsageError(
            f"--T or --temp_schedule: T {wanted} is not among the temperatures of {where}, which"
            f" were made for {there}; make others with --target_temperatures, or change T"
        )


def _temperatures(config: TrainConfig) -> set[float]:
    """Of the updates that have a distillation term."""
    alpha, temperature = config.schedule_alpha, config.schedule_T
    steps = {0, *(step for part in (alpha, temperature) for step, _ in part.entries)}
    reached = [step for step in steps if step < max(1, config.train_steps)]
    return {temperature.at(step) for step in reached if alpha.at(step) > 0.0}


def check_teacher(made: MadeWith, model: Pretrained, token: str | None) -> None:
    """Compare the teacher that targets are of with one that is named.

    Raises:
        UsageError: it is another one, or cannot be told to be the same.
    """
    name = model.name
    advice = "leave --teacher_name out, or give targets of that teacher"
    try:
        digest = teacher_digest(model, token)
    except LiquidError as error:
        if name == made.teacher:
            return
        raise UsageError(
            f"the targets are of teacher {made.teacher!r}, not {name!r}, which cannot be compared"
            f" with it ({error}); {advice}"
        ) from None
    if made.teacher_digest not in (digest, f"{BY_NAME}{name}"):
        raise UsageError(
            f"the targets are of teacher {made.teacher!r} ({made.teacher_digest[:20]}…), which is"
            f" not --teacher_name={name!r} ({digest[:20]}…); {advice}"
        )


def check_vocabulary(made: MadeWith, student: int, source: str) -> None:
    """Compare the ids that targets are over with those of a student.

    Raises:
        ModelError: there are more or fewer.
    """
    if student != made.vocabulary:
        raise ModelError(
            f"{source} has a vocabulary of {student}, and the targets are over {made.vocabulary};"
            " they cannot be aligned"
        )


def check_target_tokens(made: MadeWith, info: TokenInfo) -> None:
    """Compare the tokens that targets are of with those to train on.

    Raises:
        DataError: they are others.
    """
    if made.tokenizer != info.tokenizer_fingerprint and made.tokenizer:
        raise DataError(
            f"the targets are of tokens of another tokenizer (fingerprint {made.tokenizer}) than"
            f" that of {info.tokenizer!r} ({info.tokenizer_fingerprint or 'unknown'}); give the"
            " tokens that they were made of"
        )
    held = f"fingerprint {made.tokens}, {made.train_tokens} + {made.validation_tokens}"
    wanted = f"fingerprint {info.fingerprint}, {info.train_tokens} + {info.validation_tokens}"
    if held != wanted:
        raise DataError(
            f"the targets are of other tokens ({held}) than those to train on ({wanted}); give the"
            " tokens that they were made of, or make targets of these"
        )
