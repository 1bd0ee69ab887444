"""Points of curves, thinned so that a page stays small however long the run was."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from trainer.runtime.strict_json import finite_number

Point = tuple[float, float]
"""x, and y; y is NaN where the curve is interrupted."""

MOST_POINTS = 600

_MOST_TOKENS, _LARGEST = 1e18, 1e100
"""No run comes near; beyond, sums and differences of floats are not finite any more."""


def tokens_of(record: Mapping[str, Any]) -> float | None:
    """The tokens trained on where a line was written; None where nothing possible tells."""
    tokens = finite_number(record.get("tokens"))
    return tokens if tokens is not None and 0.0 <= tokens <= _MOST_TOKENS else None


def points_of(records: Iterable[Mapping[str, Any]], name: str) -> list[Point]:
    """The points of a value by tokens, over the records that have both, in ascending order.

    A value that is there and not finite (null in the record) is NaN, which interrupts the curve;
    so is one beyond all bounds.
    """
    found: dict[float, float] = {}
    for record in records:
        at = tokens_of(record)
        if at is not None and name in record:
            value = finite_number(record[name])
            found[at] = math.nan if value is None or abs(value) > _LARGEST else value
    return sorted(found.items())


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points that keep the ends, and the extremes of each stretch in between.

    Means would hide the spikes that one looks for.
    """
    if len(points) <= most:
        return list(points)
    stretches = max(1, (most - 2) // 2)
    inner = points[1:-1]
    kept = [points[0]]
    for number in range(stretches):
        first, end = (len(inner) * n // stretches for n in (number, number + 1))
        stretch = [point for point in inner[first:end] if not math.isnan(point[1])]
        if not stretch:
            kept.append(inner[first])
            continue
        extremes = {min(stretch, key=_height), max(stretch, key=_height)}
        kept += sorted(extremes)
    return [*kept, points[-1]]


def _height(point: Point) -> float:
    return point[1]


def value_at(points: Sequence[Point], x: float) -> float | None:
    """The value at x on the straight line between the points beside it.

    None outside of the points, and where the curve is interrupted.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 <= x <= x1:
            if x in (x0, x1):
                value = y0 if x == x0 else y1
            else:
                value = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
            return finite_number(value)
    if len(points) == 1 and points[0][0] == x:
        return finite_number(points[0][1])
    return None
