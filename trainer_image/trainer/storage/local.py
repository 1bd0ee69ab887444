"""A directory as a `Location`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from trainer.runtime.errors import StorageError
from trainer.storage.base import (
    CLAIM,
    Entry,
    Sightings,
    StorageMissingError,
    check_name,
    conflict,
    describe_writer,
    too_many,
    usable_names,
    usable_paths,
)
from trainer.storage.files import (
    BLOCK,
    Checksummed,
    atomic_write,
    check_regular,
    crc32c_of,
    directory_to_disk,
    in_home,
    lock_file,
    open_regular,
    os_errors,
    read_whole,
    remove_abandoned,
    share_content,
    temporary_beside,
    to_disk,
)

_LOCK_NAME = ".writers.json"

_WRITERS_LIMIT = 1 << 20


class LocalLocation:
    """A directory. Writers lock its hidden ``.writers.json``, which says who wrote what."""

    def __init__(self, uri: str) -> None:
        self._root = Path(in_home(uri))
        self._sightings = Sightings()
        self._claimed = False
        self._former: str | None = None
        """Who had claimed the location before; its last writes may be replaced."""
        # Own threads: a listing must not see a write that is not yet noted as ours
        self._lock = threading.RLock()

    @property
    def uri(self) -> str:
        """The directory as a path."""
        return str(self._root)

    def child(self, name: str) -> str:
        """The path of a name."""
        return str(self._root / name)

    def walk(self, *, most: int) -> list[Entry]:
        """See `Location.walk`."""
        entries: dict[str, Entry] = {}
        for path in self._root.rglob("*"):
            if path.is_file():
                name = path.relative_to(self._root).as_posix()
                entries[name] = replace(_entry(path), name=name)
                if len(entries) > most:
                    raise too_many(self.uri, most)
        return [entries[name] for name in usable_paths(sorted(entries), self.uri)]

    def list(self) -> list[Entry]:
        """See `Location.list`."""
        entries, claims = [], []
        with self._lock, os_errors("listing", self._root):
            with contextlib.suppress(FileNotFoundError):
                claims.append(_entry(self._root / CLAIM))  # before what its job writes
            try:
                found = sorted(item.name for item in os.scandir(self._root) if _is_file(item))
            except FileNotFoundError:
                found = []
            for name in usable_names(found, self.uri):
                with contextlib.suppress(FileNotFoundError):
                    entries.append(_entry(self._root / name))
            self._sightings.first_listing([*claims, *entries])
        return entries

    def stat(self, name: str, *, checksum: bool = False) -> Entry:
        """See `Location.stat`."""
        path = self._root / check_name(name)
        with self._lock, os_errors("reading", path):
            entry = _entry(path)
            self._sightings.look(entry)
        return replace(entry, crc32c=crc32c_of(path)) if checksum else entry

    def read_bytes(self, name: str, *, limit: int) -> bytes:
        """See `Location.read_bytes`."""
        path = self._root / check_name(name)
        with os_errors("reading", path), open_regular(path, limit=limit) as file:
            self._sightings.look(_entry_of_open(name, file))
            return read_whole(file, path, limit=limit)

    def get(self, name: str, destination: Path, *, limit: int | None = None) -> Entry:
        """See `Location.get`."""
        path = self._root / check_name(name)
        with contextlib.ExitStack() as stack:
            with os_errors("reading", path):
                source = stack.enter_context(open_regular(path, limit=limit))
                entry = _entry_of_open(path.name, source)
            with atomic_write(destination) as file:
                crc32c = _copy(source, file)
        self._sightings.look(entry)
        return replace(entry, crc32c=crc32c)

    def read_range(self, entry: Entry, start: int, size: int) -> bytes:
        """See `Location.read_range`."""
        path = self._root / check_name(entry.name)
        with os_errors("reading", path), open_regular(path) as file:
            if _entry_of_open(entry.name, file).generation != entry.generation:
                raise StorageMissingError(f"{path} is another file by now than it was at first")
            # Not `read`, whose buffer would make a second copy
            data = os.pread(file.fileno(), size, start)
            while len(data) < size and (more := os.pread(file.fileno(), size, start + len(data))):
                data += more[: size - len(data)]
        if len(data) < size:
            raise StorageError(f"{path} has fewer bytes than it had at first")
        return data

    def put(self, path: Path, name: str) -> Entry:
        """See `Location.put`."""
        with os_errors("reading", path):
            source = open_regular(path)
        with source:
            return self._write(self._root / check_name(name), source)

    def adopt(self, path: Path, name: str, crc32c: str) -> Entry:
        """See `Location.adopt`."""
        target = self._root / check_name(name)
        with os_errors("writing", target):
            self._root.mkdir(parents=True, exist_ok=True)
            try:
                entry = self._rename(path, target)
            except OSError as error:
                if error.errno != errno.EXDEV:
                    raise
                return self.put(path, name)
            directory_to_disk(self._root)
        return replace(entry, crc32c=crc32c)

    def copy(self, original: Entry, name: str) -> Entry:
        """See `Location.copy`: a reflink, else a hard link, else a copy of the bytes."""
        path = self._root / check_name(original.name)
        target = self._root / check_name(name)
        with os_errors("copying", path), open_regular(path) as source:
            if _entry_of_open(original.name, source).generation != original.generation:
                raise StorageMissingError(f"{path} is another file by now than the one to copy")
            with temporary_beside(target) as file:
                if not share_content(source, file, path):
                    if _copy(source, file) != original.crc32c:
                        raise StorageError(f"{path} has changed since it was written")
                    to_disk(file)
                entry = self._rename(Path(file.name), target)
            directory_to_disk(self._root)
        return replace(entry, crc32c=original.crc32c)

    def put_bytes(self, data: bytes, name: str) -> Entry:
        """See `Location.put_bytes`."""
        return self._write(self._root / check_name(name), io.BytesIO(data))

    def delete(self, name: str) -> None:
        """See `Location.delete`."""
        path = self._root / check_name(name)
        with self._lock, os_errors("removing", path):
            if not path.exists():
                return
            with self._writers() as writers:
                if not path.exists():
                    return
                self._sightings.look(_entry(path))
                self._check_unchanged(path, writers)
                path.unlink()
                writers.pop(name, None)
                self._sightings.wrote(name, 0)
            directory_to_disk(self._root)

    def claim(self) -> None:
        """See `Location.claim`."""
        with self._lock, os_errors("writing to", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            if not self._claimed:
                with self._writers() as writers:
                    self._former = writers.get(CLAIM)
            self._write(self._root / CLAIM, io.BytesIO())
            self._claimed = True

    def check_writable(self) -> None:
        """Write and remove a small file, and remove what killed writers left behind."""
        with os_errors("writing to", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            with temporary_beside(self._root / "probe") as file:
                file.write(b"\0" * 4096)
                to_disk(file)
        remove_abandoned(self._root)

    def _write(self, path: Path, source: BinaryIO) -> Entry:
        with os_errors("writing", path):
            self._root.mkdir(parents=True, exist_ok=True)
            with temporary_beside(path) as file:
                crc32c = _copy(source, file)
                to_disk(file)
                entry = self._rename(Path(file.name), path)
            directory_to_disk(self._root)
        return replace(entry, crc32c=crc32c)

    def _rename(self, made: Path, path: Path) -> Entry:
        """Give a file its name, unless somebody else changed what has it."""
        with self._lock, self._writers() as writers:
            self._check_unchanged(path, writers)
            os.replace(made, path)
            # Some user-space file systems give a renamed file another inode or time
            entry = _entry(path)
            writers[path.name] = describe_writer()
            self._sightings.wrote(path.name, entry.generation)
        return entry

    def _check_unchanged(self, path: Path, writers: dict[str, str]) -> None:
        try:
            entry = _entry(path)
        except FileNotFoundError:
            return  # nothing that could be overwritten
        if entry.generation != self._sightings.expected(path.name):
            writer = writers.get(path.name)
            if path.name != CLAIM and writer is not None and writer == self._former:
                return  # that job has lost the location to this one
            named = "a writer that left no name" if writer is None else str(writer)
            raise conflict(str(path), named, entry.updated)

    @contextmanager
    def _writers(self) -> Iterator[dict[str, str]]:
        """The lock on the directory and, to be changed, who wrote each of its files."""
        # Behind a link it would be somebody else's file that is written to
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        path = self._root / _LOCK_NAME
        with os_errors("locking", path):
            handle = os.open(path, flags, 0o666)
            try:
                check_regular(os.fstat(handle))
            except OSError:
                os.close(handle)
                raise
        with open(handle, "r+b") as file:
            lock_file(file, wait=True)
            try:
                writers = json.loads(file.read(_WRITERS_LIMIT) or b"{}")
            except (ValueError, RecursionError):
                writers = {}  # its writer was killed; only names for messages are lost
            before = dict(writers) if isinstance(writers, dict) else {}
            writers = dict(before)
            yield writers
            if writers != before:
                file.seek(0)
                file.write(json.dumps(writers).encode())
                file.truncate()


def _is_file(item: os.DirEntry[str]) -> bool:
    """Whether it is a file or a link to one.

    Raises:
        StorageError: it is a pipe, a socket or a device, which a run would wait at or fail to
            replace later.
    """
    if item.is_file():
        return True
    if not (item.name.startswith(".") or item.is_dir()):
        with contextlib.suppress(StorageMissingError), os_errors("reading", item.path):
            check_regular(item.stat())
    return False


def _entry(path: Path) -> Entry:
    return _entry_from(path.name, path.stat())


def _entry_of_open(name: str, file: BinaryIO) -> Entry:
    return _entry_from(name, os.fstat(file.fileno()))


def _entry_from(name: str, status: os.stat_result) -> Entry:
    # Atomic writes make a new inode each time; its time tells apart those that reuse a number
    generation = (status.st_mtime_ns << 64) | status.st_ino
    return Entry(name, status.st_size, None, generation, status.st_mtime)


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    checksummed = Checksummed(target)
    while block := source.read(BLOCK):
        checksummed.write(block)
    return checksummed.crc32c
