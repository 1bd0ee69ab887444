"""A run as reports look at it: its curves, its best checkpoint, and what to be warned of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.metrics.reading import RunRecord, read_run
from trainer.reports.amounts import nats, tokens_of_split, whole
from trainer.reports.curves import Point, points_of, tokens_of
from trainer.runtime.messages import shortened
from trainer.runtime.strict_json import dumps, finite_number
from trainer.settings.config import SETTINGS
from trainer.settings.layers import DEFAULT
from trainer.settings.secret_names import resembles_secret, without_values

HIDDEN = "***"

_STUDENT_LOSS = re.compile(r"val_loss_student@(\d{1,12})")

WHO = ("student", "teacher")
"""Whose losses are recorded."""

_SHOWN = 300
"""Characters of a setting's value; a schedule may have an entry for every update."""


@dataclass(frozen=True)
class Setting:
    """One setting as a report shows it."""

    name: str
    value: str
    source: str

    @property
    def by_default(self) -> bool:
        """Whether nobody gave it."""
        return self.source == DEFAULT


@dataclass(frozen=True)
class Picked:
    """The evaluation that the best checkpoint was taken at."""

    step: int
    metric: str
    value: float
    tokens: float | None
    names: tuple[str, ...]
    """Of the checkpoints."""


@dataclass(frozen=True)
class Run:
    """A run's record and its name in a report."""

    record: RunRecord
    name: str

    @classmethod
    def read(cls, location: str, name: str = "") -> Run:
        """The run at an output location. Raises as `read_run` does."""
        return cls(read_run(location), name or location)

    # ── what it is ────────────────────────────────────────────────────────────────────────────

    @property
    def location(self) -> str:
        """Where it wrote its checkpoints."""
        return str(self.record.header["run"])

    @cached_property
    def settings(self) -> list[Setting]:
        """Every setting with its source; no secret's value."""
        return [
            Setting(name, _shown(name, value), source)
            for name, value, source in _entries(self.record.header["settings"])
        ]

    def setting(self, name: str) -> Any:
        """A setting's value, None where the record has none."""
        for found, value, _ in _entries(self.record.header["settings"]):
            if found == name:
                return value
        return None

    @property
    def context(self) -> int | None:
        """The training context in tokens."""
        value = finite_number(self.record.header["phase"].get("context"))
        value = finite_number(self.setting("block_size")) if value is None else value
        return None if value is None else int(value)

    @cached_property
    def teacher(self) -> str | None:
        """The name of what taught it; None where alpha was 0 throughout, so that nothing did."""
        teacher = self.record.header["teacher"]
        taught = any(self.teacher_loss(context) is not None for context in self.contexts)
        if not (taught or teacher.get("parameters") or teacher.get("targets")):
            return None
        return str(teacher.get("name") or "stored targets")

    @property
    def tokens_identity(self) -> str:
        """What tells the tokens that it was trained on from others."""
        tokens = self.record.header["tokens"]
        return dumps(tokens.get("fingerprint") or tokens)

    @property
    def tokenizer_identity(self) -> str:
        """What tells the tokenizer from others, as far as the record has it."""
        tokens = self.record.header["tokens"]
        name = tokens.get("tokenizer_fingerprint") or tokens.get("tokenizer")
        return dumps([name, tokens.get("vocab_size")])

    @property
    def start(self) -> str:
        """The checkpoint that it began at; empty where it began from scratch."""
        return str(self.record.header["phase"].get("checkpoint") or "")

    # ── its curves ────────────────────────────────────────────────────────────────────────────

    @cached_property
    def contexts(self) -> list[int]:
        """Every context that an evaluation has a student's loss at, ascending, in tokens."""
        names = {name for record in self.record.evaluations for name in record}
        return sorted(int(match[1]) for name in names if (match := _STUDENT_LOSS.fullmatch(name)))

    def training(self, name: str) -> list[Point]:
        """A value of the log lines by tokens trained on."""
        return points_of(self.record.updates, name)

    def validation(self, who: str, context: int) -> list[Point]:
        """The validation loss of ``student`` or ``teacher`` in nats by tokens trained on."""
        return points_of(self.record.evaluations, f"val_loss_{who}@{context}")

    def teacher_loss(self, context: int) -> float | None:
        """The teacher's loss at a context in nats; None where there is none."""
        losses = [loss for _, loss in self.validation("teacher", context) if not math.isnan(loss)]
        return losses[-1] if losses else None

    @cached_property
    def tokens(self) -> float:
        """Tokens trained on up to the last line."""
        records = [*self.record.updates, *self.record.evaluations]
        return max((tokens_of(record) or 0.0 for record in records), default=0.0)

    @cached_property
    def step(self) -> int:
        """Updates done up to the last line."""
        records = [*self.record.updates, *self.record.evaluations, *self.record.checkpoints]
        records += [self.record.end] if self.record.end else []
        return max((int(record["step"]) for record in records), default=0)

    def evaluation(self, step: int) -> Mapping[str, Any]:
        """The evaluation after ``step`` updates; empty where there is none."""
        return next((one for one in self.record.evaluations if one["step"] == step), {})

    def loss_at(self, step: int, context: int) -> float | None:
        """The student's loss of the evaluation after ``step`` updates, in nats."""
        return finite_number(self.evaluation(step).get(f"val_loss_student@{context}"))

    @cached_property
    def picked(self) -> Picked | None:
        """The best checkpoint: the last one that was the best when it was taken."""
        best = [one for one in self.record.checkpoints if one["best"]]
        if not best:
            return None
        step, value = best[-1]["step"], finite_number(best[-1].get("value"))
        of_step = [one for one in self.record.checkpoints if one["step"] == step]
        tokens = tokens_of(self.evaluation(step))
        names = tuple(dict.fromkeys(one["name"] for one in of_step))
        number = math.nan if value is None else value
        return Picked(step, best[-1]["metric"], number, tokens, names)

    # ── what its losses were computed on ──────────────────────────────────────────────────────

    def evaluated_on(self, context: int) -> tuple[float | None, float | None]:
        """Tokens that the losses at a context are means over, and tokens of the whole split."""
        last: Mapping[str, Any] = next(reversed(self.record.evaluations), {})
        tokens, split = (
            finite_number(_at(last.get(name), context))
            for name in ("eval_tokens", "eval_tokens_of_split")
        )
        return tokens, split

    def evaluated(self, context: int) -> str:
        """The same in words; empty where nothing tells."""
        return tokens_of_split(*self.evaluated_on(context))

    # ── its times ─────────────────────────────────────────────────────────────────────────────

    @cached_property
    def training_seconds(self) -> float | None:
        """Time trained for, up to the last line that tells."""
        records = [*self.record.updates, *self.record.evaluations]
        records += [self.record.end] if self.record.end else []
        found = [finite_number(record.get("seconds")) for record in records]
        return max((seconds for seconds in found if seconds is not None), default=None)

    @cached_property
    def evaluation_seconds(self) -> float | None:
        """Time that its evaluations took together."""
        found = [finite_number(one.get("eval_seconds")) for one in self.record.evaluations]
        known = [seconds for seconds in found if seconds is not None]
        return sum(known) if known else None

    # ── what to be warned of ──────────────────────────────────────────────────────────────────

    @cached_property
    def warnings(self) -> list[str]:
        """Sentences on what a reader of the losses should know, the gravest first."""
        return [
            *self._of_the_training(),
            *(text for context in self.contexts for text in self._of_a_context(context)),
            *self._of_the_split(),
        ]

    def _of_the_training(self) -> Iterator[str]:
        record = self.record
        if record.end is None:
            yield f"The run has not ended: its record stops at step {whole(self.step)}."
        counts = [finite_number(one.get("skipped")) or 0.0 for one in record.updates]
        if any(counts):
            yield f"{whole(max(counts))} updates were skipped: their gradients were not finite."
        lost = sum(finite_number(one.get("loss")) is None for one in record.updates)
        if lost:
            yield f"{whole(lost)} of {len(record.updates)} log lines have no finite loss."
        if not record.evaluations:
            yield "The run has no evaluation: no validation loss is known, and no best checkpoint."
        elif self.picked is None:
            yield "No checkpoint was called best: no evaluation gave a finite loss."
        elif len(record.evaluations) > 1 and self._ended_at_its_best(self.picked):
            yield "The best evaluation is the last one: more updates might lower the loss further."
        if self.teacher is None and record.evaluations:
            yield "The run had no teacher (alpha was 0), so no gap to a teacher is known."

    def _ended_at_its_best(self, picked: Picked) -> bool:
        ended = self.record.end is not None
        return ended and picked.step == self.record.evaluations[-1]["step"]

    def _of_a_context(self, context: int) -> Iterator[str]:
        student = [loss for _, loss in self.validation("student", context)]
        teacher = self.teacher_loss(context)
        if any(math.isnan(loss) for loss in student):
            lost = sum(math.isnan(loss) for loss in student)
            yield f"At context {context}, {lost} of {len(student)} evaluations are not finite."
        known = [loss for loss in student if not math.isnan(loss)]
        if teacher is None and self.teacher is not None:
            yield (
                f"At context {context} there is no loss of the teacher: the context is past the"
                " teacher's longest one, or the stored targets have no loss at it."
            )
        elif teacher is not None and known and teacher >= min(known):
            yield (
                f"At context {context} the teacher ({nats(teacher)}) is no better than the student"
                f" ({nats(min(known))}): there is no gap to close."
            )

    def _of_the_split(self) -> Iterator[str]:
        """Where losses are means over a part of the validation split."""
        contexts: dict[str, list[str]] = {}
        for context in self.contexts:
            contexts.setdefault(self.evaluated(context), []).append(str(context))
        for told, lengths in contexts.items():
            if " of " in told and not told.startswith("all"):
                named = f"context{'s' * (len(lengths) > 1)} {' and '.join(lengths)}"
                yield f"Losses at {named} are means over {told}, not over all of it."


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, str]]:
    """Name, value and source of each setting that is written as one."""
    for name, entry in settings.items():
        if isinstance(entry, dict) and "value" in entry:
            yield name, entry["value"], str(entry.get("source", ""))


def _shown(name: str, value: Any) -> str:
    """A value as a report may show it."""
    known = SETTINGS.get(name)
    secret = resembles_secret(name) if known is None else known.metadata["secret"]
    if value is None:
        return "–"
    if secret:
        return HIDDEN
    if (name, value) == ("micro_batch", 0):
        return "auto"
    return shortened(without_values(value if isinstance(value, str) else str(value)), _SHOWN)


def _at(table: Any, context: int) -> Any:
    return table.get(str(context)) if isinstance(table, dict) else None
