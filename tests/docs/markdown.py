"""The documentation as tests see it: its pages, links, headings, blocks and commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "bench" / "README.md"]

_FENCE = re.compile(r"^( *```+)(\w*)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_BOLD = re.compile(r"\*\*`.*?`\*\*", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^()\s]+)\)")
_ASSIGNMENT = re.compile(r"[A-Z][A-Z_]*=.*", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    """Of its first line of text, from 1 on."""
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command as a page has it."""

    page: Path
    line: int
    environment: tuple[tuple[str, str], ...]
    """Variables that stand before it."""
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """What tests call it."""
        return f"{self.page.relative_to(ROOT)}:{self.line} {' '.join(self.words[:3])}"

    def starts_with(self, *words: str) -> bool:
        return self.words[: len(words)] == words


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start(3)) + 1, found[2], found[3])
        for found in _FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def sentences(page: Path) -> str:
    """The same without what is quoted of messages, which stands bold."""
    return _BOLD.sub("", prose(page))


def spans(text: str) -> list[str]:
    """What stands as code within prose, each in one line."""
    return [" ".join(span.split()) for span in _SPAN.findall(text)]


def links(page: Path) -> list[str]:
    """Where the links of a page lead."""
    return _LINK.findall(_SPAN.sub("", prose(page)))


def anchors(page: Path) -> set[str]:
    """What links may name behind a ``#``, as GitHub makes it of headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        base = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        name, number = base, 0
        while name in found:
            number += 1
            name = f"{base}-{number}"
        found.add(name)
    return found


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a block: all lines of a shell's, those behind ``$`` of a transcript."""
    lines = block.text.split("\n")
    number = 0
    while number < len(lines):
        first, text = number, lines[number]
        while text.endswith("\\"):
            number += 1
            text = f"{text[:-1]} {lines[number]}"
        number += 1
        if block.language != "sh":
            if not text.startswith("$ "):
                continue
            text = text.removeprefix("$ ")
        if words := shlex.split(text, comments=True):
            yield command(block.page, block.line + first, words)


def command(page: Path, line: int, words: list[str]) -> Command:
    """A command of words as a shell divides them."""
    before = 0
    while before < len(words) and _ASSIGNMENT.fullmatch(words[before]):
        before += 1
    pairs = (word.partition("=") for word in words[:before])
    environment = tuple((name, value) for name, _, value in pairs)
    return Command(page, line, environment, tuple(words[before:]))


COMMANDS = [found for page in PAGES for block in blocks(page) for found in commands_of(block)]
"""All of them, in the order of the pages."""
