"""The rows that the evaluation stage leaves in ``metrics.json``, and how they are read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from trainer.runtime.errors import MetricsError
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import finite_number
from trainer.storage.base import MIB
from trainer.storage.places import read_bytes

METRICS_JSON = "metrics.json"


@dataclass(frozen=True)
class EvaluationRow:
    """One checkpoint at one context; losses in nats, None where there is no teacher's."""

    checkpoint: str
    step: int
    trained_at: int | None
    """Context it was trained at, in tokens; None where its metadata does not tell."""
    context: int
    student_loss: float
    student_ppl: float
    teacher_loss: float | None
    teacher_ppl: float | None
    tokens: int | None = None
    """How many the losses are the means over; None in rows of older releases."""
    tokens_of_split: int | None = None
    """How many the whole validation split has."""


def read_rows(location: str) -> list[EvaluationRow]:
    """The rows of an evaluation.

    Args:
        location: the output of `trainer.evaluate`, or the file itself, which ends with ``.json``.

    Raises:
        MetricsError: they are no evaluation's rows.
        StorageError: they cannot be read.
    """
    file = location if location.endswith(".json") else f"{location.rstrip('/')}/{METRICS_JSON}"
    try:
        content = json.loads(read_bytes(file, limit=16 * MIB))
    except (ValueError, RecursionError):
        raise MetricsError(f"{file} is not JSON; give an evaluation's {METRICS_JSON}") from None
    if not isinstance(content, list):
        raise MetricsError(f"{file} is no list of rows; give an evaluation's {METRICS_JSON}")
    return [_row(entry, f"{file}, row {number}") for number, entry in enumerate(content, 1)]


def _row(entry: Any, source: str) -> EvaluationRow:
    names = [spec.name for spec in fields(EvaluationRow) if spec.default is MISSING]
    missing = [name for name in names if not isinstance(entry, dict) or name not in entry]
    if missing:
        raise MetricsError(
            f"{source}: it has no {missing[0]!r}; give an evaluation's {METRICS_JSON}"
        )
    if not isinstance(entry["checkpoint"], str):
        raise MetricsError(f"{source}: its checkpoint is {brief(entry['checkpoint'])}, not a text")
    return EvaluationRow(
        checkpoint=entry["checkpoint"],
        step=_whole(entry, "step", source) or 0,
        trained_at=_whole(entry, "trained_at", source),
        context=_whole(entry, "context", source) or 0,
        student_loss=_measured(entry, "student_loss"),
        student_ppl=_measured(entry, "student_ppl"),
        teacher_loss=_of_teacher(entry, "teacher_loss"),
        teacher_ppl=_of_teacher(entry, "teacher_ppl"),
        tokens=_whole(entry, "tokens", source),
        tokens_of_split=_whole(entry, "tokens_of_split", source),
    )


def _whole(entry: Mapping[str, Any], name: str, source: str) -> int | None:
    value = entry.get(name)
    if value is None and name not in ("step", "context"):
        return None
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise MetricsError(f"{source}: its {name} is {brief(value)}, not a whole number from 0 on")
    return value


def _measured(entry: Mapping[str, Any], name: str) -> float:
    """A number; NaN where it was not finite, which the file holds as null."""
    number = finite_number(entry[name])
    return math.nan if number is None else number


def _of_teacher(entry: Mapping[str, Any], name: str) -> float | None:
    """A number; None where there is none, or it was not finite, which the file does not tell."""
    return finite_number(entry[name])


def markdown_table(rows: list[EvaluationRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| checkpoint | step | trained at | context | student loss | ppl | teacher loss | ppl"
        " | tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        teacher = "– | –"
        if row.teacher_loss is not None:
            teacher = f"{row.teacher_loss:.4f} | {row.teacher_ppl:.2f}"
        lines.append(
            f"| {row.checkpoint} | {row.step} | {row.trained_at or '–'} | {row.context}"
            f" | {row.student_loss:.4f} | {row.student_ppl:.2f} | {teacher} | {_tokens(row)} |"
        )
    return "\n".join(lines) + "\n"


def _tokens(row: EvaluationRow) -> str:
    """On how many tokens the losses are means, and of how many where not of all."""
    if row.tokens is None:
        return "–"
    all_of_them = row.tokens_of_split is None or row.tokens >= row.tokens_of_split
    return f"{row.tokens:,}" if all_of_them else f"{row.tokens:,} of {row.tokens_of_split:,}"
