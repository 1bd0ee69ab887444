"""Texts that the student and its teacher went on with, as a file gives them."""

from __future__ import annotations

import json
from dataclasses import dataclass

from trainer.runtime.errors import UsageError
from trainer.runtime.messages import brief
from trainer.storage.base import MIB
from trainer.storage.places import read_bytes

_FORM = '[{"prompt": …, "student": …, "teacher": …}]'

MOST_SAMPLES, MOST_LETTERS = 50, 4000
"""How many a report shows, and how much of a text."""


@dataclass(frozen=True)
class Sample:
    """A prompt, and how each went on with it; empty where there is no text of the teacher's."""

    prompt: str
    student: str
    teacher: str


def read_samples(uri: str) -> list[Sample]:
    """The samples of a JSON file, a list of objects with ``prompt``, ``student`` and ``teacher``.

    Raises:
        UsageError: it is something else.
        StorageError: it cannot be read.
    """
    try:
        content = json.loads(read_bytes(uri, limit=16 * MIB))
    except (ValueError, RecursionError):
        raise UsageError(f"--samples={uri} is not JSON; give {_FORM}") from None
    if not isinstance(content, list):
        raise UsageError(f"--samples={uri} is no list; give {_FORM}")
    samples = []
    for number, entry in enumerate(content[:MOST_SAMPLES], 1):
        texts = entry if isinstance(entry, dict) else {}
        found = [texts.get(name, "") or "" for name in ("prompt", "student", "teacher")]
        if "student" not in texts or not all(isinstance(text, str) for text in found):
            raise UsageError(f"--samples={uri}: entry {number} is {brief(entry)}; give {_FORM}")
        samples.append(Sample(*(text[:MOST_LETTERS] for text in found)))
    return samples
