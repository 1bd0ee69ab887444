"""Stored targets as a training reads them: window by window, ahead of their use.

A batch takes windows from all over the stream, so every batch needs a few kilobytes of each shard.
Threads read them some batches ahead. Targets in Cloud Storage are copied to the work directory at
the same time, shard by shard, where its disk has room for all of them twice; until a shard is
there, and where there is no room, its windows are read from the bucket one by one.
"""

from __future__ import annotations

import base64
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from torch import Tensor

from trainer.runtime.errors import DataError, StorageError
from trainer.runtime.log import log
from trainer.storage.base import Entry, Location
from trainer.storage.places import is_remote, open_location, split_uri
from trainer.targets.shards import CHECKSUM_BYTES, VALIDATION, Index, shard_name

_READERS, _REMOTE_READERS = 4, 32
"""Windows read at once: from a disk, and from a bucket, whose answers take a while."""

_COPY_OF = "fetched-targets-"
"""Begins the name of a directory of copies, which ends with the targets' fingerprint."""

_COPIES = 4
"""Shards copied at once."""

_MOST_AHEAD = 64
_BYTES_AHEAD = 256 << 20
"""Of records that are read before their turn: batches, and bytes of all of them."""

_PATIENCE = 1.0
"""Seconds between two looks whether anybody still wants what is being waited for."""

_TRIES = 3
"""Of a window that arrives damaged."""

_BLOCK = 1 << 20
"""Tokens of the validation split whose losses are read at once."""

_Source = tuple[Location, Entry]
"""Where a shard is, and what it was at the first look."""


class Targets:
    """The targets of one training.

    Args:
        index: of the targets.
        block_size: the training context in tokens, of which the teacher's is a multiple.
        max_tokens: of the validation split that are evaluated; 0 for all.
        workdir: where targets in a bucket are copied to.
        copying: whether this process copies them; of the processes of a machine, one does.

    Raises:
        DataError: a file is missing, or has another size or CRC32C than the index says.
        StorageError: a place cannot be listed or read.
    """

    def __init__(
        self, index: Index, block_size: int, max_tokens: int, workdir: Path, *, copying: bool
    ) -> None:
        self.made = index.made
        self.fingerprint = index.fingerprint
        self._block_size = block_size
        self._sources = _sources(index)
        self.losses = _losses(index, self._sources[VALIDATION], max_tokens)
        """The teacher's over the validation split by context, in nats."""
        names = [shard_name(number) for number in range(self.made.shards)]
        remote = [name for name in names if is_remote(self._sources[name][0].uri)]
        self._threads = ThreadPoolExecutor(
            _REMOTE_READERS if remote else _READERS, thread_name_prefix="targets"
        )
        self._copies = _Copies(index, self._sources, remote, workdir, copying=copying)
        self._closed = False
        self._seen = np.zeros(self.made.windows, dtype=np.bool_)
        """Whose ids were looked at."""

    def batches(self, batches: Iterable[np.ndarray], *, pinned: bool) -> Iterator[Tensor]:
        """The records of each of some batches, read ahead.

        Args:
            batches: the numbers ``[windows]`` of each one's windows of ``block_size`` tokens.
            pinned: whether the records go into pinned memory.

        Yields:
            ``[windows, block_size, record_bytes]`` in uint8.

        Raises:
            DataError: a window is damaged.
            StorageError: a window cannot be read.
        """
        upcoming = iter(batches)
        pending: deque[list[Future[np.ndarray]]] = deque()
        ahead = 1
        while True:
            for windows in islice(upcoming, ahead - len(pending)):
                pending.append([self._threads.submit(self._records, int(n)) for n in windows])
                bytes_of_batch = len(windows) * self._block_size * self.made.record_bytes
                ahead = max(1, min(_MOST_AHEAD, _BYTES_AHEAD // bytes_of_batch))
            if not pending:
                return
            found = pending.popleft()
            shape = len(found), self._block_size, self.made.record_bytes
            records = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
            for row, window in zip(records.numpy(), found, strict=True):
                row[:] = self._result(window)
            yield records

    def _result(self, window: Future[np.ndarray]) -> np.ndarray:
        """What a thread reads; it may be waiting for a network that is gone when all is to end."""
        while not wait((window,), _PATIENCE).done:
            if self._closed:
                raise CancelledError
        return window.result()

    def close(self) -> None:
        """Read and copy no more."""
        self._closed = True
        self._copies.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _records(self, number: int) -> np.ndarray:
        """Records ``[block_size, record_bytes]`` of a window of the student."""
        made, first = self.made, number * self._block_size
        window, start = divmod(first, made.teacher_context)
        records = self._window(window)
        if not self._seen[window]:
            largest = made.layout.largest_id(records)
            if largest >= made.vocabulary:
                raise DataError(
                    f"{self._where(window)} hold token {largest}, over a vocabulary of"
                    f" {made.vocabulary}; make the targets again"
                )
            self._seen[window] = True
        return records[start : start + self._block_size].copy()

    def _window(self, window: int) -> np.ndarray:
        """Records ``[places, record_bytes]`` of a window of the teacher, verified."""
        made = self.made
        shard, place = divmod(window, made.windows_per_shard)
        size = len(made.places_of(window)) * made.record_bytes
        start = place * (made.teacher_context * made.record_bytes + CHECKSUM_BYTES)
        name = shard_name(shard)
        location, entry = self._sources[name]
        for _ in range(_TRIES):
            data = self._copies.read(name, start, size + CHECKSUM_BYTES)
            if data is None:
                data = location.read_range(entry, start, size + CHECKSUM_BYTES)
            if made.checksum(window, data[:size]) == data[size:]:
                found = np.frombuffer(data, dtype=np.uint8, count=size)
                return found.reshape(-1, made.record_bytes)
            self._copies.forget(name)
        raise DataError(
            f"{self._where(window)} do not have their checksum: {location.child(name)} is damaged,"
            " or is of other targets; make it again"
        )

    def _where(self, window: int) -> str:
        name = shard_name(window // self.made.windows_per_shard)
        places = self.made.places_of(window)
        return f"the targets of tokens {places.start} to {places.stop} ({name})"


def _losses(index: Index, source: _Source, max_tokens: int) -> dict[int, float]:
    """The teacher's mean loss by context, in nats, over the first tokens of the validation split.

    Raises:
        DataError: the file is damaged.
    """
    (location, entry), made = source, index.made
    tokens = made.validation_tokens - 1
    counted = min(tokens, max_tokens or tokens)
    checksum, fits, losses = google_crc32c.Checksum(), True, {}
    for row, context in enumerate(made.contexts):
        total = 0.0
        for first in range(0, tokens, _BLOCK):
            size = min(_BLOCK, tokens - first)
            data = location.read_range(entry, 4 * (row * tokens + first), 4 * size)
            checksum.update(data)
            log_probs = np.frombuffer(data, dtype="<f4")
            fits = fits and bool(((log_probs <= 0.0) & np.isfinite(log_probs)).all())
            total -= float(log_probs[: max(0, counted - first)].sum(dtype=np.float64))
        losses[context] = total / counted
    if not fits or base64.b64encode(checksum.digest()).decode() != index.files[VALIDATION][1]:
        raise DataError(f"{location.child(VALIDATION)} is damaged; make it again")
    return losses


def _sources(index: Index) -> dict[str, _Source]:
    """Where each file is, and what it was at the first look.

    Raises:
        DataError: one is missing, or has another size or, where storage tells it, CRC32C.
    """
    places: dict[str, tuple[Location, dict[str, Entry]]] = {}
    sources = {}
    sizes = index.made.files
    for name, (uri, crc32c) in index.files.items():
        place = split_uri(uri)[0]
        if place not in places:
            location = open_location(place)
            places[place] = location, {entry.name: entry for entry in location.list()}
        location, entries = places[place]
        entry = entries.get(name)
        if entry is None:
            raise DataError(f"{uri} is missing, which the index of the targets names")
        if entry.size != sizes[name] or entry.crc32c not in (None, crc32c):
            raise DataError(
                f"{uri} is damaged: it has {entry.size} bytes of CRC32C {entry.crc32c}, not"
                f" {sizes[name]} of {crc32c}; make it again"
            )
        sources[name] = location, entry
    return sources


class _Copies:
    """Shards of a bucket that have arrived in the work directory.

    Args:
        index: of the targets.
        sources: where the shards are.
        names: of those that are in a bucket.
        workdir: where the copies go; those of other targets that were there are removed.
        copying: whether this process copies; else it only looks whether another one has.
    """

    def __init__(
        self,
        index: Index,
        sources: Mapping[str, _Source],
        names: list[str],
        workdir: Path,
        *,
        copying: bool,
    ) -> None:
        self._directory = workdir / f"{_COPY_OF}{index.fingerprint}"
        self._local = open_location(str(self._directory))
        self._sources, self._sizes = sources, index.made.files
        self._found: dict[str, Entry] = {}
        self._wanted = set(names)
        self._threads: ThreadPoolExecutor | None = None
        if copying and names:
            self._begin(workdir, names)

    def _begin(self, workdir: Path, names: list[str]) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        for other in workdir.glob(f"{_COPY_OF}*"):
            # Nothing that could be somebody's own
            ours = re.fullmatch(r"[0-9a-f]{24}", other.name.removeprefix(_COPY_OF))
            if ours and other != self._directory:
                log.info("removing %s, copies of other targets", other)
                shutil.rmtree(other, ignore_errors=True)
        wanted = [name for name in names if self._find(name) is None]
        size, free = sum(self._sizes[name] for name in wanted), shutil.disk_usage(workdir).free
        if 2 * size > free:
            words = "%.1f GiB of targets are read as they are needed, for %s has %.1f GiB free"
            log.info(words, size / 2**30, workdir, free / 2**30)
            return
        if wanted:
            log.info("copying targets of %.1f GiB to %s", size / 2**30, self._directory)
            self._threads = ThreadPoolExecutor(_COPIES, thread_name_prefix="copies")
            for name in wanted:
                self._threads.submit(self._copy, name)

    def _copy(self, name: str) -> None:
        location, entry = self._sources[name]
        try:
            location.get(name, self._directory / name, limit=entry.size)
        except StorageError as error:
            # Its windows are read from the bucket, which ends the run if that fails too
            log.warning("%s is not copied: %s", location.child(name), error)
            self.close()

    def read(self, name: str, start: int, size: int) -> bytes | None:
        """Part of the copy of a shard; None where there is none, or none yet."""
        try:
            entry = self._find(name)
            return None if entry is None else self._local.read_range(entry, start, size)
        except StorageError:  # somebody has removed it
            self.forget(name)
            return None

    def forget(self, name: str) -> None:
        """Read a shard from the bucket from now on."""
        self._wanted.discard(name)

    def _find(self, name: str) -> Entry | None:
        if name not in self._wanted:
            return None
        if name not in self._found and (self._directory / name).exists():
            entry = self._local.stat(name)
            if entry.size == self._sizes[name]:
                self._found[name] = entry
        return self._found.get(name)

    def close(self) -> None:
        """Copy no more."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
