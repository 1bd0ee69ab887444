"""Step schedules for alpha and T (``"0:0.7,400:0.5"``) and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")

_STEP_DIGITS = 12

SCHEDULE_LIMIT = 1 << 19
"""Characters; every checkpoint has the text in it, and 20,000 entries of full precision fit."""

_STEP_ABOVE = 1e-6

MIN_LR_FRACTION = 0.1
"""The cosine ends at this fraction of the peak learning rate."""


@dataclass(frozen=True)
class Range:
    """The values a schedule may take; ``low_open`` excludes ``low`` itself and what is next to it.

    A number is divided by such a value, and the quotient must be finite in float32.
    """

    low: float
    high: float
    low_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value >= self.low + _STEP_ABOVE if self.low_open else value >= self.low
        return math.isfinite(value) and above and value <= self.high

    def __str__(self) -> str:
        if self.low_open:
            return f"above {self.low:g} and at most {self.high:g} ({_STEP_ABOVE:g} is the least)"
        return f"between {self.low:g} and {self.high:g}"


ALPHA_RANGE = Range(0.0, 1.0)

TEMPERATURE_RANGE = Range(0.0, 1000.0, low_open=True)


@dataclass(frozen=True)
class StepSchedule:
    """A piecewise-constant value over optimizer updates.

    Update ``k`` (counted from 0) takes the value of the last entry whose step is ≤ ``k``; before
    the first entry it takes ``initial``.
    """

    initial: float
    entries: tuple[tuple[int, float], ...] = ()

    @classmethod
    def parse(cls, text: str, initial: float, *, name: str, allowed: Range) -> StepSchedule:
        """Read ``step:value`` pairs separated by commas; an empty text is no entry at all.

        Raises:
            UsageError: see `schedule_entries`.
        """
        return cls(initial, schedule_entries(text, name, allowed))

    def at(self, step: int) -> float:
        """The value that update ``step`` uses."""
        index = bisect_right(self.entries, step, key=lambda entry: entry[0])
        return self.entries[index - 1][1] if index else self.initial

    def pending(self, step: int) -> str:
        """The entries that update ``step`` has not reached yet, in the notation of ``parse``."""
        return ",".join(f"{at}:{value:g}" for at, value in self.entries if at > step)

    def values(self) -> set[float]:
        """Every value that some update takes; an entry at 0 leaves none for ``initial``."""
        before = () if self.entries and self.entries[0][0] == 0 else (self.initial,)
        return {*before, *(value for _, value in self.entries)}


@lru_cache(maxsize=64)
def schedule_entries(text: str, name: str, allowed: Range) -> tuple[tuple[int, float], ...]:
    """The ``(step, value)`` pairs of a schedule; a text is parsed once, however often it is asked.

    Raises:
        UsageError: naming the entry (counted from 1) and the character where it went wrong.
    """
    given = f"--{name}={brief(text)}"
    if len(text) > SCHEDULE_LIMIT:
        raise UsageError(
            f"{given} has {len(text)} characters; {SCHEDULE_LIMIT} fit into a checkpoint, give"
            " fewer entries"
        )
    entries: list[tuple[int, float]] = []
    offset = 0
    for number, piece in enumerate(text.split(","), start=1) if text.strip() else ():
        step, value = _parse_entry(piece, offset, number, given)
        problem = None
        if value not in allowed:
            problem = f"the value {value:g} must be {allowed}"
        elif entries and step == entries[-1][0]:
            problem = f"step {step} is given twice; keep one of the entries"
        elif entries and step < entries[-1][0]:
            problem = f"step {step} comes after step {entries[-1][0]}; sort by step"
        if problem:
            entry = brief(piece.strip())
            raise UsageError(f"{given}: entry {number} ({entry}): {problem}")
        entries.append((step, value))
        offset += len(piece) + 1
    return tuple(entries)


def _parse_entry(piece: str, offset: int, number: int, given: str) -> tuple[int, float]:
    """One ``step:value``; ``offset`` is where ``piece`` starts in the whole text."""

    def fail(column: int, problem: str) -> UsageError:
        shown = piece[column : column + 1]
        at = f"{shown!r} at" if shown else "the end of the entry,"
        at += f" character {offset + column + 1}"
        return UsageError(f"{given}: entry {number} ({brief(piece.strip())}), {at}: {problem}")

    start = len(piece) - len(piece.lstrip())
    colon = piece.find(":")
    if not piece.strip():
        raise fail(len(piece), "it is empty; write step:value, for example 400:0.5")
    if colon < 0:
        raise fail(len(piece), "':' is missing; write step:value, for example 400:0.5")
    step_text = piece[start:colon].rstrip()
    if step_text.startswith("-"):
        raise fail(start, "a step cannot be negative; updates count from 0")
    digits = len(step_text) - len(step_text.lstrip("0123456789"))
    if not step_text or digits < len(step_text):
        raise fail(start + digits, "a step is a whole number; updates count from 0")
    if digits > _STEP_DIGITS:
        raise fail(start + _STEP_DIGITS, f"a step has {_STEP_DIGITS} digits at most")
    value_start = colon + 1 + len(piece[colon + 1 :]) - len(piece[colon + 1 :].lstrip())
    value_text = piece[value_start:].rstrip()
    matched = _NUMBER.match(value_text)
    if not matched or matched.end() < len(value_text):
        column = value_start + (matched.end() if matched else 0)
        raise fail(column, "a value is a decimal number, for example 0.5")
    return int(step_text), float(value_text)


def learning_rate(step: int, *, peak: float, warmup_steps: int, train_steps: int) -> float:
    """The learning rate of update ``step``: linear warmup, then cosine down to 10 % of ``peak``.

    Warmup is ``peak · (step + 1) / warmup_steps`` while ``step < warmup_steps``; the cosine
    (Loshchilov & Hutter, 2017, without restarts) reaches its end at ``train_steps``.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= train_steps:
        return peak * MIN_LR_FRACTION
    progress = (step - warmup_steps) / (train_steps - warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (MIN_LR_FRACTION + (1.0 - MIN_LR_FRACTION) * cosine)
