"""What the code can say: every text in it, with holes where values are put in."""

from __future__ import annotations

import ast
import re
from functools import cache

from tests.docs.markdown import ROOT

HOLE = "…"
_PLACES = ("trainer_image/trainer", "pipelines", "components")
_PERCENT = re.compile(r"%(?:[-+ #0]*\d*(?:\.\d+)?[sdrgfe]|%)")
_MOST = 6
"""Words that a value may have; else a hole could stand for what is invented."""
_LEAST = 12
"""Letters that a text must have beside its holes to be told from others."""


@cache
def templates() -> frozenset[str]:
    """The texts of all modules, `HOLE` standing for each value."""
    found = set()
    for place in _PLACES:
        for path in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = _text(node)
                if text and len(text.replace(HOLE, "")) >= _LEAST:
                    found.add(" ".join(text.split()))
    return frozenset(found)


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        parts = (part.value if isinstance(part, ast.Constant) else HOLE for part in node.values)
        return "".join(str(part) for part in parts)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return _PERCENT.sub(HOLE, node.value)
    return ""


def is_said(quoted: str) -> bool:
    """Whether some text of the code can be what a document quotes.

    ``…`` in the quotation stands for anything, as a hole of the code's text does. Where both have
    words, they must be the same.
    """
    longest = max(quoted.split(HOLE), key=len)
    for template in templates():
        shared = sum(len(part) for part in template.split(HOLE) if part in quoted)
        # Before the slow comparison: one of them must hold much of the other
        if (shared >= _LEAST or longest in template) and _agree(quoted, template):
            return True
    return False


def _agree(quoted: str, template: str) -> bool:
    """Whether two texts with holes can stand for the same one."""

    @cache
    def agree(at: int, of_template: int) -> bool:
        while at < len(quoted) and of_template < len(template):
            if HOLE in (quoted[at], template[of_template]):
                break
            if quoted[at] != template[of_template]:
                return False
            at, of_template = at + 1, of_template + 1
        if at < len(quoted) and quoted[at] == HOLE:
            return any(agree(at + 1, to) for to in range(of_template, len(template) + 1))
        if of_template == len(template) or template[of_template] != HOLE:
            return at == len(quoted) and of_template == len(template)
        ends = [to for to in range(at, len(quoted) + 1) if quoted.count(" ", at, to) < _MOST]
        return any(agree(to, of_template + 1) for to in ends)

    return agree(0, 0)
