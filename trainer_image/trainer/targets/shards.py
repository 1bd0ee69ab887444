"""The format of stored targets: shards of records, the teacher's losses, and the index over them.

A directory or ``gs://`` prefix holds

- ``train-00000.bin``, ``train-00001.bin``, …: of each window of the teacher its records, one for
  each place, and the CRC32C of them. The checksum covers the window's number and what the targets
  were made with too, so that a window can be read alone and cannot be taken for another;
- ``validation.bin``: the log-probabilities of the next tokens of the validation split, in float32,
  at each of the contexts in turn;
- beside each of them a ``.json``, written after it: the file counts only once that is there;
- ``targets.json``, the index, written last. It says what the targets were made with, and names
  every file with its CRC32C.

Place ``i`` of a stream of ``n`` tokens is the prediction of token ``i + 1``, ``0 ≤ i < n − 1``, by
a teacher that sees the tokens of its window up to ``i``. Whatever can be derived from what the
targets were made with is not stored: how many shards there are, and how long each one is.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import google_crc32c

from trainer.runtime.errors import DataError, LiquidError
from trainer.runtime.messages import brief
from trainer.runtime.strict_json import dumps
from trainer.settings.config import MAX_TARGET_BYTES, MOST_TEMPERATURES
from trainer.storage.base import StorageMissingError
from trainer.storage.digests import digest_of_sums
from trainer.storage.places import is_remote, open_location, split_uri
from trainer.targets.records import Layout

INDEX_NAME = "targets.json"
INDEX_LIMIT, DESCRIPTION_LIMIT = 16 << 20, 1 << 20
"""Bytes; larger ones are none of ours."""

VALIDATION = "validation.bin"

_FORMAT = 1

_SHARD_BYTES = 64 << 20
"""Of records, or one window's where that has more."""

_MOST_SHARDS = 50_000

_MOST_TOKENS, _MOST_VOCABULARY, _MOST_CONTEXT = 1 << 48, 1 << 31, 1 << 24
_MOST_CONTEXTS = 256

CHECKSUM_BYTES = 4
"""Behind each window's records."""

ESTIMATOR = "systematic sample 1"
"""How records are drawn and encoded; what they say changes with it."""


@dataclass(frozen=True)
class MadeWith:
    """Everything that decides what targets are.

    Raises:
        ValueError: naming a value that no targets can have.
        UsageError: records of that size hold no target.
    """

    tokens: str
    """Fingerprint of the token streams."""
    tokenizer: str
    """Fingerprint of their tokenizer; empty where they do not tell it."""
    train_tokens: int
    validation_tokens: int
    teacher: str
    """The name or directory it was loaded by."""
    teacher_digest: str
    """See `trainer.models.teacher.teacher_digest`."""
    teacher_precision: str
    vocabulary: int
    """Ids that the distributions are over; what the teacher has beyond is padding."""
    teacher_context: int
    temperatures: tuple[float, ...]
    """Ascending."""
    record_bytes: int
    seed: int
    estimator: str
    contexts: tuple[int, ...]
    """At which there are losses of the validation split, ascending."""

    def __post_init__(self) -> None:
        ranges = {
            "train_tokens": (2, _MOST_TOKENS),
            "validation_tokens": (2, _MOST_TOKENS),
            "vocabulary": (1, _MOST_VOCABULARY),
            "teacher_context": (1, _MOST_CONTEXT),
            "record_bytes": (1, MAX_TARGET_BYTES),
            "seed": (0, 2**64 - 1),
        }
        for name, (low, high) in ranges.items():
            if not _whole(value := getattr(self, name), low, high):
                raise ValueError(f"{name} is {brief(value)}, not a whole number {low} to {high}")
        texts = ("tokens", "tokenizer", "teacher", "teacher_digest")
        for name in (*texts, "teacher_precision", "estimator"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.isprintable() or len(value) > 4096:
                raise ValueError(f"{name} is {brief(value)}, not a text")
        _check_ascending("temperatures", self.temperatures, _is_temperature, MOST_TEMPERATURES)
        _check_ascending(
            "contexts", self.contexts, lambda n: _whole(n, 1, _MOST_CONTEXT), _MOST_CONTEXTS
        )
        if self.estimator != ESTIMATOR:
            raise ValueError(f"the estimator is {self.estimator!r}, and only {ESTIMATOR!r} is read")
        if self.shards > _MOST_SHARDS:
            raise ValueError(f"{self.shards} shards would be needed; at most {_MOST_SHARDS} can be")
        assert self.layout.record_bytes == self.record_bytes

    @cached_property
    def layout(self) -> Layout:
        """How the records are read."""
        return Layout(self.vocabulary, self.temperatures, self.record_bytes)

    @property
    def places(self) -> int:
        """Predictions of the training split."""
        return self.train_tokens - 1

    @property
    def windows(self) -> int:
        """Of the teacher over the training split; the last one may be shorter."""
        return -(-self.places // self.teacher_context)

    @property
    def windows_per_shard(self) -> int:
        """Of all shards but the last, which may have fewer."""
        return max(1, _SHARD_BYTES // (self.teacher_context * self.record_bytes))

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-self.windows // self.windows_per_shard)

    def windows_of(self, shard: int) -> range:
        """The windows of a shard."""
        first = shard * self.windows_per_shard
        return range(first, min(first + self.windows_per_shard, self.windows))

    def places_of(self, window: int) -> range:
        """The places of a window of the teacher."""
        first = window * self.teacher_context
        return range(first, min(first + self.teacher_context, self.places))

    @property
    def files(self) -> dict[str, int]:
        """The name of every file with its size in bytes: shards in order, then the losses."""
        sizes = {}
        for shard in range(self.shards):
            windows = self.windows_of(shard)
            places = self.places_of(windows[-1]).stop - self.places_of(windows[0]).start
            sizes[shard_name(shard)] = places * self.record_bytes + len(windows) * CHECKSUM_BYTES
        return sizes | {VALIDATION: 4 * len(self.contexts) * (self.validation_tokens - 1)}

    @cached_property
    def digest(self) -> bytes:
        """Of all of it."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def checksum(self, window: int, records: bytes) -> bytes:
        """The `CHECKSUM_BYTES` that stand behind the records of a window."""
        start = google_crc32c.value(self.digest + window.to_bytes(8, "big"))
        return int(google_crc32c.extend(start, records)).to_bytes(CHECKSUM_BYTES, "big")

    def differences(self, other: MadeWith) -> list[str]:
        """Where another one differs from this, in words."""
        pairs = [(s.name, getattr(self, s.name), getattr(other, s.name)) for s in fields(self)]
        return [f"{name} {brief(a)}, not {brief(b)}" for name, a, b in pairs if a != b]


@dataclass(frozen=True)
class Index:
    """What ``targets.json`` says."""

    made: MadeWith
    files: Mapping[str, tuple[str, str]]
    """Of each file's name: the URI it is at, and its CRC32C in base64."""

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the targets, the same wherever they are."""
        sums = {name: crc32c for name, (_, crc32c) in self.files.items()}
        text = json.dumps([self.made.digest.hex(), sums], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    @property
    def shares(self) -> list[str]:
        """The digests of the places that the files were joined from, see `read_share`."""
        sums: dict[str, dict[str, str]] = {}
        for name, (uri, crc32c) in self.files.items():
            sums.setdefault(uri.removesuffix(name), {})[name] = crc32c
        return [digest_of_sums(of_place) for of_place in sums.values()]

    def dump(self, uri: str) -> bytes:
        """The JSON of an index at ``uri``; files beside it are named without their directory."""
        described = {
            name: {"at": "" if at == open_location(uri).child(name) else at, "crc32c": crc32c}
            for name, (at, crc32c) in self.files.items()
        }
        content = {"format": _FORMAT, "made_with": asdict(self.made), "files": described}
        return dumps(content | {"fingerprint": self.fingerprint}, indent=1).encode()


@dataclass(frozen=True)
class Share:
    """Which files of targets are at a place."""

    made: MadeWith | None
    """What they were made with; None where there are none."""
    digest: str
    """Of all of them."""


def read_share(uri: str) -> Share:
    """What is described at a directory or ``gs://`` prefix; the files themselves are not read.

    Raises:
        DataError: a description is none, or one of another file.
        StorageError: it cannot be listed or read.
    """
    location, made = open_location(uri), None
    sums: dict[str, str] = {}
    for entry in location.list():
        if entry.name.endswith(".bin"):
            crc32c = entry.crc32c
            if made is None or crc32c is None:
                data = location.read_bytes(description_name(entry.name), limit=DESCRIPTION_LIMIT)
                made, crc32c = parse_description(data, entry.name, uri)
            sums[entry.name] = crc32c
    return Share(made, digest_of_sums(sums))


def shard_name(shard: int) -> str:
    """The name of a shard by its number."""
    return f"train-{shard:05}.bin"


def shard_number(name: str) -> int | None:
    """The number of a shard by its name; None for the validation losses."""
    return None if name == VALIDATION else int(name.removeprefix("train-").removesuffix(".bin"))


def description_name(name: str) -> str:
    """The name of the description beside a file."""
    return name.removesuffix(".bin") + ".json"


def dump_description(made: MadeWith, name: str, crc32c: str) -> bytes:
    """The JSON beside a file."""
    content = {"format": _FORMAT, "made_with": asdict(made), "file": name, "crc32c": crc32c}
    return dumps(content, indent=1).encode()


def parse_description(data: bytes, name: str, uri: str) -> tuple[MadeWith, str]:
    """What a file was made with, and its CRC32C, from the JSON beside it.

    Args:
        data: the JSON.
        name: of the file.
        uri: of the directory, for messages.

    Raises:
        DataError: it is no description, or one of another file.
    """
    where = f"{uri}/{description_name(name)}"
    content = _content(data, where)
    if content.get("file") != name:
        raise DataError(f"{where} is of {brief(content.get('file'))}: somebody renamed it")
    return _made_with(content, where), _crc32c(content.get("crc32c"), where)


def read_index(uri: str) -> Index:
    """The index at a directory or ``gs://`` prefix.

    A file may be beside the index, or where it was joined from: by an absolute path where the index
    is local too, or a ``gs://`` URI. It always has its own name there.

    Raises:
        DataError: there is none, it is damaged, or it names files that cannot be.
        StorageError: it cannot be read.
    """
    location = open_location(uri)
    where = location.child(INDEX_NAME)
    try:
        data = location.read_bytes(INDEX_NAME, limit=INDEX_LIMIT)
    except StorageMissingError as error:
        raise DataError(
            f"there are no whole teacher targets at {uri} ({error}); make them with python -m"
            " trainer.teacher_targets, whose --join ends the work of several workers"
        ) from None
    content = _content(data, where)
    made = _made_with(content, where)
    described = content.get("files")
    if not isinstance(described, dict) or len(described) != made.shards + 1:
        raise _no_targets(where, f"it does not name {made.shards + 1} files")
    files = {}
    for name in made.files:
        entry = described.get(name)
        if not isinstance(entry, dict):
            raise _no_targets(where, f"it does not name {name}")
        at = entry.get("at")
        files[name] = (
            location.child(name) if at == "" else _elsewhere(at, name, where),
            _crc32c(entry.get("crc32c"), where),
        )
    index = Index(made, files)
    if content.get("fingerprint") != index.fingerprint:
        raise _no_targets(where, "its fingerprint is not that of what it says")
    return index


def _elsewhere(at: Any, name: str, where: str) -> str:
    """Where a file is that is not beside the index.

    Raises:
        DataError: it is not named as targets are, or a local file named from a bucket.
    """
    if isinstance(at, str) and at.isprintable() and len(at) <= 4096 and at.endswith(f"/{name}"):
        parts = split_uri(at)[0].split("/") if is_remote(at) else at.split("/")
        local = at.startswith("/") and not is_remote(where)
        if (is_remote(at) or local) and not {".", ".."} & set(parts):
            return at
    raise _no_targets(where, f"it has {name} at {brief(at)}, which is no place for it")


def _content(data: bytes, where: str) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _no_targets(where, error) from None
    if not isinstance(content, dict):
        raise _no_targets(where, "it is no table")
    if content.get("format") != _FORMAT:
        found = brief(content.get("format"))
        raise DataError(f"{where} is of format {found}, not {_FORMAT}; make the targets again")
    return content


def _made_with(content: Mapping[str, Any], where: str) -> MadeWith:
    described = content.get("made_with")
    names = {spec.name for spec in fields(MadeWith)}
    if not isinstance(described, dict) or described.keys() != names:
        raise _no_targets(where, "it does not say what they were made with")
    several = ("temperatures", "contexts")
    lists = {name: tuple(described[name]) for name in several if isinstance(described[name], list)}
    try:
        return MadeWith(**described | lists)
    except (ValueError, LiquidError) as error:
        raise _no_targets(where, error) from None


def _crc32c(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) != 8 or not value.isascii():
        raise _no_targets(where, f"a crc32c is {brief(value)}")
    return value


def _no_targets(where: str, reason: object) -> DataError:
    return DataError(
        f"{where} does not describe teacher targets ({str(reason)[:300]}); make them with python -m"
        " trainer.teacher_targets"
    )


def _whole(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _is_temperature(value: Any) -> bool:
    return type(value) is float and math.isfinite(value) and value > 0.0


def _check_ascending(name: str, values: Any, fits: Any, most: int) -> None:
    if (
        not isinstance(values, tuple)
        or not 0 < len(values) <= most
        or not all(map(fits, values))
        or any(a >= b for a, b in itertools.pairwise(values))
    ):
        raise ValueError(f"{name} are {brief(values)}, not 1 to {most} numbers that ascend")
