"""The lines of ``metrics.jsonl``, which ``docs/formats.md`` describes.

A file is parsed as a foreign one: whatever is wrong is told in one line, with its place.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.runtime.errors import MetricsError
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import dumps

METRICS = "metrics.jsonl"
"""The file's name beside a run's checkpoints."""

FORMAT = 1

FILE_LIMIT = 1 << 29
"""Bytes; a larger file is no run's."""

LINE_LIMIT = 8 << 20
"""Bytes; the longest line is the header, with a schedule that may have an entry a step."""

HEADER, START, UPDATE, EVALUATION, CHECKPOINT, END = (
    *("header", "start", "update"),
    *("evaluation", "checkpoint", "end"),
)

_TABLES = {
    HEADER: ("settings", "code", "libraries", "machine", "student", "teacher", "tokens", "phase"),
    START: ("machine",),
    EVALUATION: ("eval_tokens", "eval_tokens_of_split"),
}
"""Fields of each kind of line that hold named values."""

_TEXTS = {HEADER: ("run", "started"), START: ("time",), CHECKPOINT: ("name", "metric")}

_FLAGS = {CHECKPOINT: ("best",)}

_MEASURED = (UPDATE, EVALUATION, CHECKPOINT, END)
"""Kinds whose other fields are all numbers."""


class NewerMetricsError(MetricsError):
    """A record of a format that this program does not know yet; it is not damaged."""


@dataclass(frozen=True)
class Line:
    """One line: its kind, the updates done when it was written, all of its fields, its bytes."""

    kind: str
    step: int
    """0 for the header."""
    fields: dict[str, Any]
    """With NaN for each measured number that was not finite."""
    data: bytes
    """With the newline."""


def encode(kind: str, fields: Mapping[str, Any]) -> bytes:
    """The bytes of a line, its newline among them; a number that is not finite becomes null."""
    return dumps({"kind": kind, **fields}).encode() + b"\n"


def parse(data: bytes, uri: str) -> list[Line]:
    """The lines of a file; a last line without its newline, which a kill leaves, is dropped.

    Args:
        data: the file's bytes.
        uri: what messages call the file.

    Raises:
        NewerMetricsError: the file is of a later format.
        MetricsError: a line is no line of a run's record, or stands where none of its kind can;
            names the file and the line's number.
    """
    lines: list[Line] = []
    for number, line in enumerate(_split(data), 1):
        try:
            lines.append(_line(line))
            _check_order(lines)
        except MetricsError as error:
            raise type(error)(f"{uri}, line {number}: {error}") from None
    return lines


def _split(data: bytes) -> Iterator[bytes]:
    """The lines with their newlines, without a copy of all of them at once."""
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start : end + 1]
        start = end + 1


def _line(data: bytes) -> Line:
    if len(data) > LINE_LIMIT:
        raise MetricsError(f"it has {len(data)} bytes; at most {LINE_LIMIT} are expected")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        raise MetricsError("it is not JSON") from None
    if not isinstance(fields, dict):
        raise MetricsError("it is no table of named values")
    kind = fields.get("kind")
    if kind not in (HEADER, *_TABLES, *_MEASURED):
        raise MetricsError(f"there is no kind of line {brief(kind)}")
    if kind == HEADER:
        _check_format(fields.get("format"))
        step = 0
    else:
        step = fields.get("step", -1)
        if type(step) is not int or not 0 <= step < 1 << 63:
            raise MetricsError(f"its step is {brief(step)}, not a whole number from 0 on")
    return Line(kind, step, _checked(kind, fields), data)


def _check_format(version: Any) -> None:
    if type(version) is not int or version < 1:
        raise MetricsError(f"its format is {brief(version)}, not a whole number from 1 on")
    if version > FORMAT:
        raise NewerMetricsError(
            f"it is of format {version}, and this program reads formats up to {FORMAT}; update"
            " the program"
        )


def _checked(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, each of the type that its kind of line has."""
    tables, texts, flags = (table.get(kind, ()) for table in (_TABLES, _TEXTS, _FLAGS))
    for name in (*tables, *texts, *flags):
        if name not in fields:
            raise MetricsError(f"it has no {name!r}")
    for name, value in fields.items():
        if name in tables:
            right, words = isinstance(value, dict), "a table of named values"
        elif name in texts:
            right, words = isinstance(value, str), "a text"
        elif name in flags:
            right, words = isinstance(value, bool), "true or false"
        elif kind in _MEASURED and name != "kind":
            right, words = _is_measured(value), "a number"
        else:
            continue
        if not right:
            raise MetricsError(f"its {name} is {brief(value)}, not {words}")
    if kind not in _MEASURED:
        return fields
    return {name: math.nan if value is None else value for name, value in fields.items()}


def _is_measured(value: Any) -> bool:
    if value is None:
        return True
    return type(value) is float or (type(value) is int and abs(value) < 1 << 63)


def _check_order(lines: list[Line]) -> None:
    """Check the last line against those before: one header, first; no step back; nothing twice."""
    line = lines[-1]
    if (line.kind == HEADER) != (len(lines) == 1):
        words = "is no header" if len(lines) == 1 else "is a second header"
        raise MetricsError(f"it {words}, which a record begins with")
    if len(lines) == 1:
        return
    before = lines[-2]
    if line.step < before.step:
        raise MetricsError(f"its step {line.step} is before the {before.step} of the line above")
    if before.kind == END:
        raise MetricsError("it comes after the end of the run")
    if line.kind in (UPDATE, EVALUATION):
        for other in reversed(lines[:-1]):
            if other.step < line.step or other.kind == HEADER:
                break
            if other.kind == line.kind:
                raise MetricsError(f"it is a second {line.kind} of step {line.step}")
