"""What messages show: foreign values, cut short where they are long, and durations."""

from __future__ import annotations

from typing import Any

_SHOWN = 160
"""Characters."""


def shortened(text: str, most: int = _SHOWN) -> str:
    """A text: whole, or its beginning of ``most`` characters."""
    return text if len(text) <= most else f"{text[:most]}…"


def brief(value: Any) -> str:
    """A value as Python writes it: whole, or its beginning."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{repr(value[:_SHOWN])[:-1]}…"
    return shortened(repr(value))


def one_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def duration(seconds: float) -> str:
    """Seconds as people say them, in two units at most: ``2 h 5 min``."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    first = next(i for i, (_, size) in enumerate(units) if seconds + size / 120 >= size)
    (large, size), (small, least) = units[first : first + 2]
    whole, rest = divmod(round(seconds / least), size // least)
    return f"{whole} {large}" + f" {rest} {small}" * bool(rest)
