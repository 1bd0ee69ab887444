"""What every storage backend has in common: the interface, its errors, names, conflicts."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

from trainer.runtime.errors import StorageError, UsageError
from trainer.runtime.log import log

KIB, MIB = 2**10, 2**20

CLAIM = ".claim"
"""What a job replaces to say that the location is its own; no listing shows it."""


class StorageMissingError(StorageError):
    """A file, object or bucket that does not exist."""


class StorageTooLargeError(StorageError):
    """A file or object with more bytes than the reader allows."""


class StorageConflictError(StorageError):
    """A name that another writer changed since this job last saw it."""


@dataclass(frozen=True)
class Entry:
    """One file of a location.

    `updated` is the server's or file system's time, in unix seconds: compare it with the `updated`
    of another entry, never with the clock of this machine. `crc32c` is in base64 as Cloud Storage
    writes it, None where it was not asked for. `generation` changes with every write.
    """

    name: str
    size: int
    crc32c: str | None
    generation: int
    updated: float


@dataclass(frozen=True)
class TransferPolicy:
    """How transfers are cut up, how long a silence lasts and how long to try again.

    Raises:
        UsageError: `chunk_bytes` is not a positive multiple of 256 KiB.
    """

    chunk_bytes: int = 32 * MIB
    """bytes of one upload request; Cloud Storage asks for a multiple of 256 KiB"""
    range_bytes: int = 32 * MIB
    """bytes of one download request; larger objects travel in several at once"""
    threads: int = 8
    """downloads at once"""
    connect_timeout: float = 10.0
    """seconds to connect, and for one block of an upload to be taken"""
    read_timeout: float = 60.0
    """seconds without a byte of the answer"""
    first_delay: float = 1.0
    """seconds before the first retry; each further wait is twice as long"""
    longest_delay: float = 30.0
    """seconds between two retries at most"""
    deadline: float = 600.0
    """seconds without progress after which a request is given up"""
    first_deadline: float = 60.0
    """the same before the first answer, so that a run without network ends soon"""

    def __post_init__(self) -> None:
        if self.chunk_bytes <= 0 or self.chunk_bytes % (256 * KIB):
            raise UsageError(
                f"chunk_bytes={self.chunk_bytes}: a positive multiple of {256 * KIB} is needed"
            )


class Location(Protocol):
    """Named files below one URI. Every method may raise `StorageError`; all are thread-safe."""

    @property
    def uri(self) -> str:
        """The ``gs://`` prefix or directory, without a slash at the end."""

    def child(self, name: str) -> str:
        """The full URI of a name."""

    def walk(self, *, most: int) -> list[Entry]:
        """The files below at any depth, by their paths from here, sorted; for reading alone.

        Raises:
            StorageError: there are more than `most`.
        """

    def list(self) -> list[Entry]:
        """The files directly below, sorted by name; empty if there is no such directory.

        The first call also sets what later writes expect to find.
        """

    def stat(self, name: str, *, checksum: bool = False) -> Entry:
        """One file; with `checksum` also its CRC32C where that has to be computed.

        Raises:
            StorageMissingError: there is no such file.
        """

    def read_bytes(self, name: str, *, limit: int) -> bytes:
        """The content of a small file, verified.

        Raises:
            StorageMissingError: there is no such file.
            StorageTooLargeError: it has more than `limit` bytes; nothing has been read then.
        """

    def get(self, name: str, destination: Path, *, limit: int | None = None) -> Entry:
        """Copy a file to a local path, verified, whole or not at all.

        Raises:
            StorageMissingError: there is no such file.
            StorageTooLargeError: it has more than `limit` bytes; nothing has been read then.
        """

    def read_range(self, entry: Entry, start: int, size: int) -> bytes:
        """Part of a file, from the version that was looked at; its content is not verified.

        Args:
            entry: what `list`, `stat` or `get` gave.
            start: the first byte.
            size: how many, all of them within the file.

        Raises:
            StorageMissingError: the file is gone, or is another one by now.
        """

    def put(self, path: Path, name: str) -> Entry:
        """Copy a local file to a name, whole or not at all.

        Raises:
            StorageConflictError: another writer changed that name; its content is left alone.
        """

    def adopt(self, path: Path, name: str, crc32c: str) -> Entry:
        """As `put`, for a file that is this job's alone and serves nothing else afterwards.

        Where it lies on the location's own file system it is renamed.

        Args:
            path: a file that has been forced to disk.
            name: what it is called from now on.
            crc32c: the checksum that was computed while it was written.
        """

    def copy(self, original: Entry, name: str) -> Entry:
        """Give a file that this job wrote another name; its bytes stay where they are stored.

        Args:
            original: what `adopt`, `put` or `stat` gave, with its CRC32C.
            name: the further name.

        Raises:
            StorageConflictError: another writer changed that name; its content is left alone.
            StorageMissingError: the original is gone, or is another one by now.
        """

    def put_bytes(self, data: bytes, name: str) -> Entry:
        """Write a small file. Raises as `put` does."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none.

        Raises:
            StorageConflictError: another writer changed that name; its content is left alone.
        """

    def claim(self) -> None:
        """Say that from now on this job alone writes here; called again before each snapshot.

        Of several jobs that have looked, the first to claim goes on. A job that looks later may
        take the location over until the former claims again; then what the former is still writing
        may be replaced. So exactly one goes on, and a killed one is in nobody's way.

        Raises:
            StorageConflictError: another job has claimed it since this one looked or claimed.
        """

    def check_writable(self) -> None:
        """Fail now, with the reason, if writing later would."""


def check_name(name: str) -> str:
    """The name itself if it can be a file directly below any directory.

    Raises:
        StorageError: it is empty, hidden, too long, or has a separator or a control character.
    """
    reason = None
    if not name or name.startswith("."):
        reason = "it is empty or starts with a dot"
    elif "/" in name or "\\" in name:
        reason = "it has a path separator"
    elif not name.isprintable():
        reason = "it has a character that cannot be shown"
    elif len(os.fsencode(name)) > 200:
        reason = "it is longer than 200 bytes"
    if reason:
        raise StorageError(f"{name!r} cannot be the name of a file here: {reason}")
    return name


def usable_names(names: Iterable[str], uri: str) -> Iterator[str]:
    """Of the names in a listing those that `check_name` takes; the others are logged."""
    for name in names:
        if _is_usable(name, name, uri):
            yield name


def usable_paths(paths: Iterable[str], uri: str) -> Iterator[str]:
    """Of paths in a listing those whose every part `check_name` takes; the others are logged."""
    for path in paths:
        if all(_is_usable(part, path, uri) for part in path.split("/")):
            yield path


def _is_usable(name: str, path: str, uri: str) -> bool:
    try:
        check_name(name)
    except StorageError as error:
        if not name.startswith(".") or name.strip(".") == "":
            log.warning("%s: %signored: %s", uri, "" if name == path else f"{path!r} is ", error)
        return False
    return True


def too_many(uri: str, most: int) -> StorageError:
    """The error for a directory of more files than its reader allows."""
    return StorageError(f"{uri} has more than {most} files; give the directory of the files alone")


def too_large(what: str, size: int, limit: int) -> StorageTooLargeError:
    """The error for a file or object of more bytes than its reader allows."""
    return StorageTooLargeError(f"{what} has {size} bytes; at most {limit} are expected here")


def describe_writer() -> str:
    """This process for the message that another job's conflict shows: host, process, job."""
    jobs = ("CLOUD_ML_JOB_ID", "KFP_RUN_ID", "KFP_POD_NAME")
    job = next((f", job {os.environ[name]}" for name in jobs if os.environ.get(name)), "")
    return f"host {_host_name()}, process {os.getpid()}{job}"


class Sightings:
    """The generation that each name of a location must still have for this job to replace it.

    That is what the first listing showed, or an earlier look at the single name, and from then on
    what the job itself wrote. Later listings do not count: taking them over would turn another
    job's write into something that may be replaced.
    """

    def __init__(self) -> None:
        self._expected: dict[str, int] = {}
        self._listed = False
        self._lock = threading.Lock()

    def first_listing(self, entries: Iterable[Entry]) -> None:
        """Take over a listing, if it is the first."""
        with self._lock:
            if not self._listed:
                self._listed = True
                for entry in entries:
                    self._expected.setdefault(entry.name, entry.generation)

    def look(self, entry: Entry) -> None:
        """Take over a look at one name, if there was none and no listing before."""
        with self._lock:
            if not self._listed:
                self._expected.setdefault(entry.name, entry.generation)

    def wrote(self, name: str, generation: int) -> None:
        """Note an own write, or a removal as generation 0."""
        with self._lock:
            self._expected[name] = generation

    def expected(self, name: str) -> int:
        """The generation that must be there; 0 for no file."""
        with self._lock:
            return self._expected.get(name, 0)


def conflict(uri: str, writer: str, updated: float) -> StorageConflictError:
    """The error for a name that somebody else wrote."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(updated))
    # Whoever may write there may put anything into the name
    shown = "".join(letter for letter in writer if letter.isprintable())[:200]
    return StorageConflictError(
        f"{uri} was written by another job ({shown}, {when}) since this one"
        f" ({describe_writer()}) looked; it is left as it is: give each job its own output"
    )


@cache
def _host_name() -> str:
    return socket.gethostname()
