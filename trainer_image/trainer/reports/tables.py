"""Tables of texts, as Markdown and as lines for a terminal; pages have them as HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from tabulate import tabulate

_MARK = "▸ "


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers, which stand at the right."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Rows of texts, as a report shows them."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    """Numbers of the rows that stand out."""
    notes: Sequence[str] = field(default=())
    """Sentences below."""
    folded: bool = False
    """Whether a page shows it only when asked."""

    def markdown(self) -> str:
        """The table in Markdown, marked rows with an arrow; its caption is left out."""
        rows = [[_cell(text) for text in row] for row in self._with_marks()]
        headings = [_cell(column.title) for column in self.columns]
        return _layout(rows, headings, self.columns, "pipe")

    def text(self) -> str:
        """The table in aligned columns."""
        rows = [[" ".join(text.split()) for text in row] for row in self._with_marks()]
        return _layout(rows, [column.title for column in self.columns], self.columns, "simple")

    def _with_marks(self) -> list[list[str]]:
        return [
            [(_MARK if number in self.marked else "") + row[0], *row[1:]]
            for number, row in enumerate(self.rows)
        ]


def _layout(
    rows: list[list[str]], headings: list[str], columns: Sequence[Column], style: str
) -> str:
    if not rows:
        return ""
    alignment = ["right" if column.numeric else "left" for column in columns]
    return str(tabulate(rows, headings, tablefmt=style, colalign=alignment, disable_numparse=True))


def _cell(text: str) -> str:
    return escaped(text).replace("|", "\\|")


def escaped(text: str) -> str:
    """A text from data in Markdown: one line, shown as it stands."""
    return _SIGNS.sub(r"\\\g<0>", html.escape(" ".join(text.split()), quote=False))


_SIGNS = re.compile(r"[\\`*\[\]~]|^[#+>-]|(?<!\w)_|_(?!\w)")
"""What Markdown would take for its own; an underscore within a word it does not."""
