"""Which name was meant by a wrong one: only what is plausible, for a wrong hint misleads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CLOSE = 0.65
"""Of the letters that two names share, as `difflib.SequenceMatcher.ratio` tells."""
_CLOSE_WORDS = 0.5
"""The same for each pair of words, where both names have as many: batch_size is no block_size."""
_SHORTEST = 3
"""Letters of a beginning that tells something."""


def near_name(name: str, known: Iterable[str]) -> str:
    """The known name that is meant, else an empty text.

    That is one whose words the name has left out or added to (``NVIDIA_H100`` of
    ``NVIDIA_H100_80GB``), that it begins, or that differs from it in a few letters. Case, leading
    dashes and the sign between words do not count.
    """
    wanted = _words(name)
    by_words: dict[tuple[str, ...], str] = {}
    for entry in known:
        by_words.setdefault(_words(entry), entry)
    longer = [words for words in by_words if set(wanted) <= set(words)]
    longer = longer or [words for words in by_words if _begins(wanted, words)]
    if wanted and longer:
        return by_words[min(longer, key=_length)]
    shorter = [words for words in by_words if len(words) > 1 and set(words) <= set(wanted)]
    if shorter:
        return by_words[max(shorter, key=_length)]
    texts = {"_".join(words): words for words in by_words}
    for text in difflib.get_close_matches("_".join(wanted), texts, 5, cutoff=_CLOSE):
        if _words_are_close(wanted, texts[text]):
            return by_words[texts[text]]
    return ""


def _words(name: str) -> tuple[str, ...]:
    return tuple(filter(None, re.split(r"[-_\s]+", name.lower())))


def _length(words: tuple[str, ...]) -> int:
    return len("_".join(words))


def _begins(wanted: tuple[str, ...], words: tuple[str, ...]) -> bool:
    start = "_".join(wanted)
    return len(start) >= _SHORTEST and "_".join(words).startswith(start)


def _words_are_close(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    if abs(_length(one) - _length(other)) > max(1, _length(one) // 3):
        return False
    if len(one) != len(other):
        return True
    return all(
        difflib.SequenceMatcher(None, *pair).ratio() >= _CLOSE_WORDS
        for pair in zip(one, other, strict=True)
    )
