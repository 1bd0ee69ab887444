"""Links lead somewhere, and every page can be reached from the README."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import PAGES, ROOT, anchors, blocks, links

LANGUAGES = ("sh", "text", "yaml", "mermaid", "dockerfile")


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for target in links(page):
        place, _, anchor = target.partition("#")
        if place.startswith(("https://", "http://")):
            continue
        path = (page.parent / place).resolve() if place else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(target)
    assert not wrong


def test_the_readme_leads_to_every_page() -> None:
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(ROOT / "README.md")}
    assert linked >= set(PAGES[1:])


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_blocks_say_what_they_are(page: Path) -> None:
    """A block of commands that is not called one would not be run."""
    for block in blocks(page):
        transcript = block.text.startswith("$ ") and not block.language
        assert transcript or block.language in LANGUAGES, f"line {block.line}"
