"""Plots as SVG that stands in a page: its colours are the page's, its text can be read aloud.

A plot is drawn at the width of a phone, so that a narrow screen shows its text at full size; a wide
one shows several beside each other.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.reports.amounts import count
from trainer.reports.curves import Point, thinned

COLOURS = ("student", "teacher", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
"""The page's colours of lines; each is a variable of its style sheet."""
DASHES = ("solid", "dashed", "dotted")
"""As both matplotlib and style sheets call them."""
INK, MUTED, GRID = "ink", "muted", "grid"

_VARIABLES = (INK, MUTED, GRID, *COLOURS)
_SENTINELS = {name: f"#0f{number:02x}ba" for number, name in enumerate(_VARIABLES)}
"""What is drawn in place of each colour, to be replaced by the page's."""

_WIDTH, _HEIGHT, _POINTS_PER_INCH = 360.0, 205.0, 72.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 62.0, 10.0, 38.0
_TEXT, _LABEL_HEIGHT = 11.0, 12.5

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "liquid",
    "path.simplify": True,
    "text.parse_math": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": _TEXT,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "axes.edgecolor": _SENTINELS[MUTED],
    "axes.labelcolor": _SENTINELS[MUTED],
    "text.color": _SENTINELS[INK],
    "xtick.color": _SENTINELS[MUTED],
    "ytick.color": _SENTINELS[MUTED],
    "grid.color": _SENTINELS[GRID],
    "grid.linewidth": 0.7,
}


@dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    colour: str = COLOURS[0]
    """A name of `COLOURS`, or of the page's inks."""
    dash: str = DASHES[0]
    steps: bool = False
    """Whether a value holds since the one before, as that of a schedule does."""
    dots: bool = False


@dataclass(frozen=True)
class Mark:
    """A point with a ring around it."""

    x: float
    y: float
    label: str


NUMBER = "plot-number-"
"""How names inside of a drawing begin, until a page that has several numbers them."""


@dataclass(frozen=True)
class Plot:
    """A plot and what stands around it in the page."""

    title: str
    unit: str
    svg: Markup
    alternative: str
    """What the plot shows, in words."""

    def numbered(self, number: int) -> Markup:
        """The drawing with names that no other one of the page has."""
        return Markup(self.svg.replace(NUMBER, f"p{number}-"))  # noqa: S704 - as it was


def plot(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    end: float,
    x_label: str = "tokens trained on",
    marks: Sequence[Mark] = (),
    dividers: Sequence[float] = (),
    labelled: bool = True,
    zero: bool = False,
) -> Plot | None:
    """Draw curves over one axis; None where no curve has a point.

    Args:
        title: what the y axis is, and of what.
        unit: of the y axis.
        lines: the curves; thinned here.
        end: where the x axis ends, the same for plots beside each other.
        x_label: of the x axis.
        marks: points to ring.
        dividers: where to draw an upright line, between two phases.
        labelled: whether each curve has its label at its end.
        zero: whether the y axis begins at 0.
    """
    shown = [
        replace(line, label=_printable(line.label), points=thinned(line.points))
        for line in lines
        if any(not math.isnan(y) for _, y in line.points)
    ]
    if not shown:
        return None
    alternative = _in_words(_printable(title), unit, x_label, shown, marks)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own are
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(
            figsize=(_WIDTH / _POINTS_PER_INCH, _HEIGHT / _POINTS_PER_INCH), dpi=_POINTS_PER_INCH
        )
        canvas = FigureCanvasSVG(figure)
        right = _RIGHT if labelled else 14.0
        axes = figure.add_axes(
            (
                _LEFT / _WIDTH,
                _BOTTOM / _HEIGHT,
                (_WIDTH - _LEFT - right) / _WIDTH,
                (_HEIGHT - _TOP - _BOTTOM) / _HEIGHT,
            )
        )
        _draw(axes, shown, marks, dividers)
        _scale(axes, shown, end=end, zero=zero, x_label=x_label)
        if labelled:
            _label_ends(axes, shown)
        text = StringIO()
        canvas.print_svg(text, metadata={"Date": None})
    return Plot(title, unit, _for_page(text.getvalue(), alternative), alternative)


def _printable(text: str) -> str:
    """A text without the characters that XML cannot hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _draw(
    axes: Axes, lines: Sequence[Line], marks: Sequence[Mark], dividers: Sequence[float]
) -> None:
    for x in dividers:
        axes.axvline(x, color=_SENTINELS[MUTED], linewidth=0.8, linestyle="dotted")
    for line in lines:
        xs, ys = zip(*line.points, strict=True)
        # A point alone has no line, and would not be seen
        alone = sum(not math.isnan(y) for y in ys) == 1
        axes.plot(
            xs,
            ys,
            color=_SENTINELS[line.colour],
            linestyle=line.dash,
            drawstyle="steps-pre" if line.steps else "default",
            marker="o" if alone or (line.dots and len(xs) <= 40) else "",
            markersize=3.2,
        )
    for mark in marks:
        axes.plot(
            mark.x,
            mark.y,
            linestyle="none",
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor=_SENTINELS[INK],
            markeredgewidth=1.3,
            clip_on=False,
        )


def _scale(axes: Axes, lines: Sequence[Line], *, end: float, zero: bool, x_label: str) -> None:
    heights = [y for line in lines for _, y in line.points if not math.isnan(y)]
    low, high = min(heights), max(heights)
    low = min(low, 0.0) if zero else low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    axes.set_xlim(0.0, end if end > 0 else 1.0)
    axes.set_ylim(low if zero else low - margin, high + margin)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=_TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    if high >= 1e4:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    elif high < 1e-2:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.set_xlabel(x_label, fontsize=_TEXT, labelpad=3)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """Each curve's label right of its end, moved apart where two would overlap."""
    low, high = axes.get_ylim()
    per_unit = (_HEIGHT - _TOP - _BOTTOM) / (high - low)
    ends = []
    for line in lines:
        last = next(y for _, y in reversed(line.points) if not math.isnan(y))
        ends.append(((last - low) * per_unit, line))
    ends.sort(key=lambda entry: entry[0])
    heights = _apart([height for height, _ in ends], _HEIGHT - _TOP - _BOTTOM)
    for height, (_, line) in zip(heights, ends, strict=True):
        axes.annotate(
            line.label,
            (1.0, height / (_HEIGHT - _TOP - _BOTTOM)),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=_SENTINELS[line.colour],
            fontsize=_TEXT,
            annotation_clip=False,
        )


def _apart(heights: list[float], room: float) -> list[float]:
    """Ascending heights with at least a label's height between them, inside of ``room``."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + _LABEL_HEIGHT if placed else height))
    excess = max(0.0, placed[-1] - room) if placed else 0.0
    return [height - excess for height in placed]


def _in_words(
    title: str, unit: str, x_label: str, lines: Sequence[Line], marks: Sequence[Mark]
) -> str:
    described = []
    for line in lines:
        values = [y for _, y in line.points if not math.isnan(y)]
        span = f"from {values[0]:.4g} to {values[-1]:.4g}"
        described.append(f"{line.label} {span if len(values) > 1 else f'{values[0]:.4g}'}")
    described += [f"{mark.label} at {count(mark.x)}, {mark.y:.4g}" for mark in marks]
    of_unit = f" in {unit}" if unit else ""
    return f"{title}{of_unit} against {x_label}: {'; '.join(described)}."


# ── from matplotlib's file to a part of a page ─────────────────────────────────────────────────

_XLINK = "{http://www.w3.org/1999/xlink}href"
_FONT = re.compile(r"font-family:[^;]*;? ?")
_LONG_NUMBER = re.compile(r"(\d+\.\d{2})\d+")
_NO_ROTATION = re.compile(r"rotate\(-?0 [^)]*\)")


def _for_page(text: str, alternative: str) -> Markup:
    """The drawing without namespaces, outside references and names that another one has too."""
    root = ElementTree.fromstring(text[text.index("<svg") :])  # noqa: S314 - drawn here
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = (_attribute(*pair, used) for pair in element.attrib.items())
        element.attrib = dict(pair for pair in attributes if pair is not None)
        element.text = (element.text or "").strip() or None
        element.tail = None
    root.attrib = {
        "viewBox": f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        "role": "img",
        "aria-label": alternative,
    }
    title = ElementTree.Element("title")
    title.text = alternative
    root.insert(0, title)
    drawn = ElementTree.tostring(root, encoding="unicode")
    for name, sentinel in _SENTINELS.items():
        drawn = drawn.replace(sentinel, f"var(--{name})")
    return Markup(drawn)  # noqa: S704 - ElementTree has escaped what it holds


def _attribute(name: str, value: str, used: set[str]) -> tuple[str, str] | None:
    """An attribute as it stands in the page, None where it is of no use there."""
    if name == _XLINK:
        return "href", f"#{NUMBER}{value[1:]}"
    if name == "id":
        return ("id", NUMBER + value) if value in used else None
    if name == "transform" and _NO_ROTATION.fullmatch(value):
        return None
    if name == "style":
        value = _FONT.sub("", value)  # the page's own is inherited
    return name, _LONG_NUMBER.sub(r"\1", value.replace("url(#", f"url(#{NUMBER}"))
