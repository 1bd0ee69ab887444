"""Points of curves: thinned without losing what one looks for, and read between."""

from __future__ import annotations

import math

import pytest

from trainer.reports.curves import MOST_POINTS, points_of, thinned, value_at


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(x), math.sin(x / 900)) for x in range(100_000)]
    points[33_333] = (33_333.0, 50.0)
    points[77_777] = (77_777.0, -50.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept == sorted(set(kept))
    assert {points[0], points[-1], points[33_333], points[77_777]} <= set(kept)
    assert set(kept) <= set(points)


@pytest.mark.parametrize("number", [0, 1, 2, 599, 600])
def test_short_curves_stay_whole(number: int) -> None:
    points = [(float(x), 1.0) for x in range(number)]
    assert thinned(points) == points


def test_a_stretch_without_values_stays_a_gap() -> None:
    points = [(float(x), math.nan if 400 <= x < 800 else 1.0) for x in range(1200)]
    kept = thinned(points, 60)
    gap = [x for x, y in kept if math.isnan(y)]
    assert gap
    assert all(400 <= x < 800 for x in gap)


def test_points_are_those_that_a_record_has() -> None:
    records = [
        {"tokens": 20, "loss": 2.0},
        {"tokens": 10, "loss": math.nan},
        {"tokens": 30},
        {"tokens": math.nan, "loss": 7.0},
    ]
    found = points_of(records, "loss")
    assert [x for x, _ in found] == [10.0, 20.0]
    assert math.isnan(found[0][1])
    assert found[1][1] == 2.0


@pytest.mark.parametrize(
    ("x", "value"), [(0, 4.0), (5, 3.0), (10, 2.0), (15, None), (20, None), (30, 1.0), (31, None)]
)
def test_values_between_points(x: float, value: float | None) -> None:
    points = [(0.0, 4.0), (10.0, 2.0), (20.0, math.nan), (30.0, 1.0)]
    assert value_at(points, x) == value


def test_the_value_of_a_single_point() -> None:
    assert value_at([(5.0, 1.0)], 5.0) == 1.0
    assert value_at([(5.0, 1.0)], 4.0) is None
    assert value_at([], 4.0) is None
