"""Foreign values in messages: cut short where they are long."""

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
