"""Names that resemble a secret's, also mistyped: what stands beside them is never shown."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_WORDS = ("token", "secret", "passw", "key", "credential")

_TYPED = ("hftokenvalue", "hftoken", "token", "secret", "password", "apikey")
"""What a mistyped name may have been meant to be, in letters alone."""

_CLOSE = 0.75
"""Of the letters that two names share, as `difflib.SequenceMatcher.ratio` tells."""

_ASSIGNED = re.compile(
    r"""(?P<name>[^\s"'=:,{}\[\]]+)(?P<sign>["']?\s*[=:]\s*)(?P<value>"[^"]*"?|'[^']*'?|[^\s,}\]]+)"""
)

_SHOWN = 12
"""Characters of a name that may be shown though it resembles a secret's: hardly one of its own."""


def resembles_secret(name: str) -> bool:
    """Whether a name, or how it begins, is that of a secret or a mistyped one."""
    letters = re.sub(r"[^a-z]", "", name.lower())
    if any(word in letters for word in _WORDS):
        return True
    return any(
        difflib.SequenceMatcher(None, letters[:length], word).ratio() > _CLOSE
        for word in _TYPED
        for length in (len(word) - 1, len(word), len(word) + 1)
    )


def shown_name(text: str, known: Iterable[str]) -> str:
    """A wrong name as a message may show it: without a secret's value that was typed into it."""
    name = re.split(r"[\s=:,\"']", text, maxsplit=1)[0]
    if not resembles_secret(text):
        return text
    near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.85)
    return name if near or len(name) <= _SHOWN else "***"


def without_values(text: str) -> str:
    """The text with the value of every assignment hidden whose name resembles a secret's."""

    def masked(match: re.Match[str]) -> str:
        shown = "***" if resembles_secret(match["name"]) else match["value"]
        return f"{match['name']}{match['sign']}{shown}"

    return _ASSIGNED.sub(masked, text)
