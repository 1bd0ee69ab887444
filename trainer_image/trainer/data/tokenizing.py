"""Texts to ids: in a child process, and long documents in pieces with the ids of the whole.

A pattern that never ends, or ids that need more memory than there is, then end the child alone.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from trainer.runtime.bounded import MEMORY, SECONDS, BoundedError, BoundedProcess
from trainer.runtime.errors import DataError
from trainer.runtime.log import log

PIECE = 1 << 18
"""Characters of a long document that are tokenized at a time."""
OVERLAP = 1 << 13
"""Characters that two neighbouring pieces share; their ids must agree in the middle half."""
LARGEST = 1 << 21
"""Characters of the longest piece, where shorter ones show no place to cut."""

_REQUEST = 1 << 19
"""Characters of short documents in one request: what a child does within its memory."""
_CHARACTERS_PER_SECOND = 1 << 16
"""The least that a slow machine tokenizes in a second."""
_MEMORY_PER_BYTE = 16
"""Of a tokenizer's description."""
_LOG_EVERY = 64
"""Pieces of one document."""

_ACROSS_WORDS = re.compile(r"[^▁Ġ\s][▁Ġ ]")
_ANYTHING = re.compile(r"(\.|\[\\s\\S\]|\[\\S\\s\]|\[\\w\\W\]|\[\\W\\w\]|\[\^\])[*+{]")
"""In a pattern: text of any length and kind, so that a match may depend on what is far away."""


@dataclass(frozen=True)
class _Window:
    """Tokens of a part of a document: ids ``[tokens]``, places ``[tokens, 2]`` in the document.

    ``first`` tells of each token whether it is the first of a word of the pre-tokenizer.
    """

    begin: int
    end: int
    ids: np.ndarray
    places: np.ndarray
    first: np.ndarray

    def middle(self, low: int, high: int) -> slice:
        """The tokens that lie between two characters."""
        inside = np.flatnonzero((self.places[:, 0] >= low) & (self.places[:, 1] <= high))
        return slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0)


class Encoder:
    """What a tokenizer makes of documents, without special tokens."""

    def __init__(self, tokenizer: Any, *, piece: int = PIECE, overlap: int = OVERLAP) -> None:
        self._tokenizer = tokenizer
        self._piece, self._overlap = piece, overlap
        self._child: BoundedProcess | None = None
        self._words_are_apart = False
        self._local = False

    def __enter__(self) -> Self:
        if not _is_plain(self._tokenizer):
            return self
        backend = self._tokenizer.backend_tokenizer
        text = backend.to_str()
        parts = json.loads(text)
        self._local = not any(map(_ANYTHING.search, _patterns(parts)))
        model = parts["model"]
        self._words_are_apart = (
            model.get("type") == "BPE"
            and not model.get("dropout")
            and not any(map(_ACROSS_WORDS.search, model["vocab"]))
        )
        special = getattr(backend, "encode_special_tokens", False)
        with _one_line(self._tokenizer.name_or_path):
            memory = MEMORY + _MEMORY_PER_BYTE * len(text)
            self._child = BoundedProcess(f"{__name__}:answer", memory=memory)
            self._child.ask(json.dumps({"load": text, "special": special}).encode(), seconds=60)
        return self

    def __exit__(self, *error: object) -> None:
        if self._child is not None:
            self._child.close()

    def pieces(self, texts: list[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """Ids ``[tokens]`` of documents in order, and whether a document ends there.

        Raises:
            DataError: a document cannot be tokenized in bounded time and memory.
        """
        if self._child is None:
            encoded = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            yield from ((np.asarray(ids, dtype=np.uint32), True) for ids in encoded)
            return
        short: list[str] = []
        for text in texts:
            is_long = len(text) > self._piece
            if is_long or sum(map(len, short)) + len(text) > _REQUEST:
                yield from self._short(short)
                short = []
            if is_long:
                yield from self._long(text)
            else:
                short.append(text)
        yield from self._short(short)

    def _short(self, texts: list[str]) -> Iterator[tuple[np.ndarray, bool]]:
        if not texts:
            return
        reply = self._ask({"encode": texts}, sum(map(len, texts)))
        counts = np.frombuffer(reply, np.int64, len(texts))
        ids = np.frombuffer(reply, np.uint32, offset=counts.nbytes)
        for part in np.split(ids, np.cumsum(counts)[:-1]):
            yield part, True

    def _long(self, text: str) -> Iterator[tuple[np.ndarray, bool]]:
        """A document in windows, each cut where it agrees with the next."""
        length, taken, done = self._piece, 0, 0
        window = self._window(text, 0, length)
        while window.end < len(text):
            if self._local:
                following = self._window(text, window.end - self._overlap, self._piece)
                cut = self._cut(text, window, following, taken)
            else:
                cut = None
            if cut is None:
                length *= 2
                window = self._longer(text, window, length, taken)
                continue
            yield window.ids[taken : cut[0]], False
            (_, taken), window, length = cut, following, self._piece
            done += 1
            if done % _LOG_EVERY == 0:
                log.info("tokenizing: %d of %d characters of a document", window.begin, len(text))
        yield window.ids[taken:], True

    def _longer(self, text: str, window: _Window, length: int, taken: int) -> _Window:
        longer = None if length > LARGEST else self._window(text, window.begin, length)
        if longer is None or not np.array_equal(longer.ids[:taken], window.ids[:taken]):
            raise DataError(
                f"a document of {len(text)} characters cannot be tokenized: the tokenizer of"
                f" {self._tokenizer.name_or_path!r} shows no place to cut it at from character"
                f" {window.begin + 1} on; divide it into documents of at most {LARGEST} characters"
            )
        return longer

    def _cut(
        self, text: str, window: _Window, following: _Window, taken: int
    ) -> tuple[int, int] | None:
        """The token of both windows to go over from one to the other at; None where none is safe.

        The window knows what comes before the place, the following one what comes after it. Where
        they agree on a place between two words, so does the whole.
        """
        margin = self._overlap // 4
        low, high = following.begin + margin, window.end - margin
        ours, theirs = window.middle(low, high), following.middle(low, high)
        if not (
            np.array_equal(window.ids[ours], following.ids[theirs])
            and np.array_equal(window.places[ours], following.places[theirs])
        ):
            return None
        between = window.first[ours] & following.first[theirs]
        if self._words_are_apart and not between[1:].any():
            between = np.array([_starts_word(text, place) for place in window.places[ours, 0]])
        candidates = np.flatnonzero(between)
        candidates = candidates[candidates + ours.start > max(taken, 1)]
        if not len(candidates):
            return None
        offset = int(candidates[len(candidates) // 2])
        return ours.start + offset, theirs.start + offset

    def _window(self, text: str, begin: int, length: int) -> _Window:
        part = text[begin : begin + length]
        reply = np.frombuffer(self._ask({"window": part}, len(part)), np.int64).reshape(4, -1)
        ids, starts, ends, words = reply
        first = np.diff(words, prepend=-1) != 0
        places = np.stack((starts, ends), axis=1) + begin
        return _Window(begin, begin + len(part), ids.astype(np.uint32), places, first)

    def _ask(self, request: dict[str, Any], characters: int) -> bytes:
        assert self._child is not None, "there is a child"
        data = json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass")
        with _one_line(self._tokenizer.name_or_path):
            return self._child.ask(data, seconds=SECONDS + characters / _CHARACTERS_PER_SECOND)


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    """Turn what became of the child into a `DataError`."""
    try:
        yield
    except BoundedError as error:
        raise DataError(
            f"the data set cannot be tokenized with the tokenizer of {name!r}: {error}"
        ) from None


def _is_plain(tokenizer: Any) -> bool:
    """Whether calling it does no more than its backend."""
    from transformers import PreTrainedTokenizerFast

    return isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(type(tokenizer), name, None) is getattr(PreTrainedTokenizerFast, name, None)
        for name in ("__call__", "_encode_plus", "_batch_encode_plus")
    )


def _patterns(part: Any) -> Iterator[str]:
    """Every regular expression of a tokenizer's description, outside its vocabulary."""
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "Regex":
                yield str(value)
            elif key not in ("vocab", "merges", "added_tokens"):
                yield from _patterns(value)
    elif isinstance(part, list):
        for value in part:
            yield from _patterns(value)


def _starts_word(text: str, place: int) -> bool:
    return place > 0 and text[place] == " " and not text[place - 1].isspace()


# ── in the child ──────────────────────────────────────────────────────────────────────────────
_loaded: Any = None


def answer(request: bytes) -> bytes:
    """Load a tokenizer, or encode texts with it.

    Returns:
        For texts, the number of ids of each (int64), and the ids (uint32); for a window, its ids,
        where each starts and ends in characters, and the word it is of (int64 each).
    """
    global _loaded  # the child serves one tokenizer
    from tokenizers import Tokenizer

    asked = json.loads(request.decode("utf-8", "surrogatepass"))
    if "load" in asked:
        _loaded = Tokenizer.from_str(asked["load"])
        _loaded.no_truncation()
        _loaded.no_padding()
        _loaded.encode_special_tokens = asked["special"]
        return b""
    if "encode" in asked:
        encoded = _loaded.encode_batch_fast(asked["encode"], add_special_tokens=False)
        every = [np.array(one.ids, np.uint32) for one in encoded]
        counts = np.array([len(ids) for ids in every], np.int64)
        return counts.tobytes() + np.concatenate(every).tobytes()
    window = _loaded.encode(asked["window"], add_special_tokens=False)
    places = np.array(window.offsets, np.int64).reshape(-1, 2)
    words = [-1 if word is None else word for word in window.word_ids]
    return np.stack((window.ids, places[:, 0], places[:, 1], words)).astype(np.int64).tobytes()
