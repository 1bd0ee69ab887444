"""What the documentation quotes is what the code says."""

from __future__ import annotations

import re

import pytest

from tests.docs.markdown import ROOT, prose, spans
from tests.docs.messages import is_said

ERRORS = ROOT / "docs" / "errors.md"
COOKBOOK = ROOT / "docs" / "cookbook.md"


def messages() -> list[str]:
    """What stands bold and as code on the page of errors."""
    bold = re.findall(r"\*\*(`.*?`)\*\*", prose(ERRORS), re.DOTALL)
    return [text for found in bold for text in spans(found)]


def seen() -> list[str]:
    """Of the cookbook: the lines that one sees, which are code of several words."""
    bullets = re.findall(r"(?ms)^- \*\*You see\*\*(.*?)(?=^- |^$)", prose(COOKBOOK))
    return [text for found in bullets for text in spans(found) if " " in text]


@pytest.mark.parametrize("quoted", messages())
def test_a_message_is_one_of_the_code(quoted: str) -> None:
    assert is_said(quoted)


@pytest.mark.parametrize("quoted", seen())
def test_what_one_sees_is_what_the_code_says(quoted: str) -> None:
    assert is_said(quoted)


def test_there_are_messages_to_compare() -> None:
    assert len(messages()) > 50
    assert len(seen()) > 8


@pytest.mark.parametrize(
    "invented",
    [
        "missing: --block_size; set it on the command line or in --config",
        "the teacher's vocabulary of … is larger than the student's of …",
        "… holds a different run",
        "the context of the student is invented",
    ],
)
def test_an_invented_message_is_found_out(invented: str) -> None:
    assert not is_said(invented)
