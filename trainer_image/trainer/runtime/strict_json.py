"""JSON that every reader takes: Python writes NaN and Infinity, which the standard lacks."""

from __future__ import annotations

import json
import math
from typing import Any


def dumps(value: Any, *, indent: int | None = None) -> str:
    """The JSON text (RFC 8259), null for each number that is not finite; other types as text."""
    try:
        return _dumps(value, indent)
    except ValueError:
        return _dumps(_finite(value), indent)


def _dumps(value: Any, indent: int | None) -> str:
    return json.dumps(value, indent=indent, default=str, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def finite_number(value: Any) -> float | None:
    """A number of parsed JSON as a float; None where it is none, or not finite, or too large."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # whole numbers of JSON have no bound
        return None
    return number if math.isfinite(number) else None
