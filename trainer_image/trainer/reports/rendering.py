"""Reports as one HTML page that asks for nothing else, and as Markdown."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from trainer.reports.tables import escaped

_STYLE = "style.css"


def page(template: str, **values: Any) -> str:
    """The HTML of a template of this package; every value is escaped but for the drawings."""
    style = Markup(Path(__file__).with_name(_STYLE).read_text(encoding="utf-8"))  # noqa: S704 - ours
    return _environment().get_template(template).render(style=style, **values)


def markdown(template: str, **values: Any) -> str:
    """The Markdown of a template of this package, which itself names what is to be escaped."""
    return _environment().get_template(template).render(**values)


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=select_autoescape(("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["escaped"] = escaped
    numbers = itertools.count(1)
    environment.filters["drawing"] = lambda plot: plot.numbered(next(numbers))
    return environment
