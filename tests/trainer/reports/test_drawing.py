"""Plots: what is in the SVG, and where."""

from __future__ import annotations

import itertools
import math
import re

import matplotlib
import pytest

from trainer.reports.drawing import COLOURS, DASHES, Line, Mark, plot

FALLING = [(0.0, 5.0), (100.0, 4.0), (200.0, 3.5)]


def test_colours_are_the_pages() -> None:
    drawn = plot("Loss", "nats", [Line("a", FALLING), Line("b", FALLING, "teacher")], end=200.0)
    assert drawn is not None
    assert set(re.findall(r"#[0-9a-f]{6}", drawn.svg)) == set()
    assert {"student", "teacher", "ink", "muted", "grid"} >= set(
        re.findall(r"var\(--(\w+)\)", drawn.svg)
    )
    assert "font-family" not in drawn.svg


def test_the_same_plot_is_the_same_text_whatever_the_users_settings() -> None:
    def draw() -> str:
        drawn = plot("Loss", "nats", [Line("a", FALLING)], end=200.0, marks=[Mark(100, 4, "best")])
        assert drawn is not None
        return str(drawn.svg)

    first = draw()
    with matplotlib.rc_context({"font.size": 40, "text.usetex": True, "lines.linewidth": 9}):
        assert draw() == first


def test_the_words_name_the_numbers() -> None:
    lines = [Line("student", FALLING), Line("teacher", [(0.0, 3.0)])]
    drawn = plot("Loss", "nats", lines, end=200.0, marks=[Mark(100.0, 4.0, "picked")])
    assert drawn is not None
    assert drawn.alternative == (
        "Loss in nats against tokens trained on: student from 5 to 3.5; teacher 3;"
        " picked at 100, 4."
    )


def test_labels_do_not_lie_over_each_other() -> None:
    lines = [
        Line(str(number), [(0.0, 1.0), (9.0, 1.0 + number / 1e6)], COLOURS[number % 8], dash)
        for number, dash in enumerate(DASHES * 3)
    ]
    drawn = plot("Loss", "nats", [*lines, Line("far", [(0.0, 90.0), (9.0, 90.0)])], end=9.0)
    assert drawn is not None
    heights = sorted(
        float(y) for y in re.findall(r'text-anchor: start[^>]*? x="30[^"]*" y="([^"]+)"', drawn.svg)
    )
    assert len(heights) == 10
    assert min(b - a for a, b in itertools.pairwise(heights)) > 11.0
    assert heights[0] > 5
    assert heights[-1] < 175


@pytest.mark.parametrize("points", [[], [(0.0, math.nan)], [(1.0, math.nan), (2.0, math.nan)]])
def test_nothing_to_show_is_no_plot(points: list[tuple[float, float]]) -> None:
    assert plot("Loss", "nats", [Line("a", points)], end=2.0) is None


@pytest.mark.parametrize(
    "points",
    [
        [(0.0, 0.0)],
        [(0.0, 1.0), (1.0, math.nan), (2.0, 1.0)],
        [(0.0, 1e-300), (1.0, 1e300)],
        [(0.0, -5.0), (1.0, -5.0)],
        [(1e15, 1.0), (2e15, 2.0)],
    ],
    ids=str,
)
def test_odd_numbers_are_drawn(points: list[tuple[float, float]]) -> None:
    drawn = plot("Loss", "", [Line("$_{\x00\ud7ff<&", points)], end=points[-1][0], zero=True)
    assert drawn is not None
    assert "&lt;&amp;" in drawn.svg
    assert "nan" not in drawn.svg
