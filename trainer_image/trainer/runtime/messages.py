"""Foreign values in messages: cut short where they are long."""

from __future__ import annotations

from typing import Any

_SHOWN = 160
"""Characters."""


def shortened(text: str) -> str:
    """A text: whole, or its beginning."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def brief(value: Any) -> str:
    """A value as Python writes it: whole, or its beginning."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{repr(value[:_SHOWN])[:-1]}…"
    return shortened(repr(value))
