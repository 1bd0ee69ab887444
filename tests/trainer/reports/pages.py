"""A report's page as a reader finds it: its tables, its pictures, its text."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

_EMPTY = ("meta", "br", "img", "link")


@dataclass
class Element:
    """A tag with what it says of itself."""

    tag: str
    attributes: dict[str, str | None]


@dataclass
class Page(HTMLParser):
    """Parsed HTML; a tag that is not closed in its turn fails."""

    html: str
    elements: list[Element] = field(default_factory=list)
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    """By the table's label, its rows of texts, the headings first."""
    marked: dict[str, list[str]] = field(default_factory=dict)
    """By the table's label, the row that stands out."""
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()
        self._open: list[str] = []
        self._label = ""
        self.feed(self.html)
        self.close()
        assert self._open == []
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        assert len(attributes) == len(attrs)
        self.elements.append(Element(tag, attributes))
        if tag not in _EMPTY:
            self._open.append(tag)
        if attributes.get("role") == "region":
            label = attributes["aria-label"] or ""
            taken = sum(name == label or name.startswith(f"{label} (") for name in self.tables)
            self._label = f"{label} ({taken + 1})" if taken else label
            self.tables[self._label] = []
        elif tag == "tr":
            self.tables[self._label].append([])
            if attributes.get("class") == "marked":
                self.marked[self._label] = self.tables[self._label][-1]
        elif tag in ("td", "th"):
            self.tables[self._label][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[self._label][-1][-1] += data

    def all(self, tag: str) -> list[Element]:
        return [element for element in self.elements if element.tag == tag]


def check_self_contained(page: Page) -> None:
    """No script, nothing to ask a network for, every picture with words, no name twice."""
    tags = {element.tag for element in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "foreignobject"}
    assert "http:" not in page.html
    assert "https:" not in page.html
    assert "@import" not in page.html
    names = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(names) == len(set(names))
    for element in page.elements:
        assert not [name for name in element.attributes if name.startswith("on")]
        assert "src" not in element.attributes
        target = element.attributes.get("href") or element.attributes.get("xlink:href")
        assert target is None or target.removeprefix("#") in names
    assert set(re.findall(r"url\(#?([^)]*)\)", page.html)) <= {str(name) for name in names}
    for picture in page.all("svg"):
        assert picture.attributes["role"] == "img"
        assert len(picture.attributes["aria-label"] or "") > 20
    assert len(page.all("title")) == 1 + len(page.all("svg"))
