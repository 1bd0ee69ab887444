"""Numbers as reports show them; what is missing or not finite is a dash."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from trainer.runtime import messages
from trainer.runtime.strict_json import finite_number

NOTHING = "–"

_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def nats(value: Any) -> str:
    """A loss in nats per token, in four decimals."""
    number = finite_number(value)
    return NOTHING if number is None else f"{number:.4f}"


def signed_nats(value: Any) -> str:
    """A difference of losses in nats per token."""
    number = finite_number(value)
    return NOTHING if number is None else f"{number:+.4f}".replace("-", "−")


def ratio(value: Any) -> str:
    """A perplexity, in two decimals, in four figures where it is large."""
    number = finite_number(value)
    if number is None:
        return NOTHING
    return f"{number:,.2f}" if number < 1e5 else f"{number:.3e}"


def percent(value: Any) -> str:
    """A share as a percentage, in one decimal."""
    number = finite_number(value)
    return NOTHING if number is None else f"{100 * number:.1f}\u00a0%".replace("-", "−")


def count(value: Any) -> str:
    """A number of things in three figures and a unit, ``1.23 M``; small ones as they are."""
    number = finite_number(value)
    if number is None:
        return NOTHING
    for unit, name in _UNITS:
        if abs(number) >= unit * 0.9995:
            return f"{number / unit:.3g} {name}"
    return f"{number:.4g}"


def whole(value: Any) -> str:
    """A whole number with separators, ``1,234,567``."""
    number = finite_number(value)
    return NOTHING if number is None else f"{number:,.0f}"


def figures(value: Any) -> str:
    """A number in four significant figures."""
    number = finite_number(value)
    return NOTHING if number is None else f"{number:.4g}"


def duration(value: Any) -> str:
    """Seconds as every message shows them; a dash where they are none."""
    seconds = finite_number(value)
    return NOTHING if seconds is None or seconds < 0 else messages.duration(seconds)


def moment(text: str) -> str:
    """A time in ISO form as ``2025-03-04 05:06 UTC``; another text as it stands."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def tokens_of_split(tokens: Any, split: Any) -> str:
    """On how much of the validation split losses are means; empty where nothing tells."""
    if finite_number(tokens) is None:
        return ""
    if finite_number(split) is None:
        return f"{whole(tokens)} tokens"
    if tokens >= split:
        return f"all {whole(split)} tokens of the validation split"
    return f"{whole(tokens)} of the {whole(split)} tokens of the validation split"
