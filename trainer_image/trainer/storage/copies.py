"""Directories of an object store, copied once to a machine and told apart by their checksums.

A copy appears under its name when it is whole, and its name holds the digest of what was listed. So
a process that is killed leaves nothing that another one takes for whole, and a directory that has
changed is another copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime.errors import StorageError
from trainer.runtime.log import log
from trainer.storage.base import MIB, Entry, StorageMissingError
from trainer.storage.files import (
    crc32c_of,
    directory_to_disk,
    in_home,
    lock_file,
    os_errors,
    to_disk,
)
from trainer.storage.places import open_location
from trainer.storage.scratch import remove_abandoned_scratch, scratch_directory

DEFAULT_CACHE = "~/.cache/liquid_annealing"

_RANGE = 8 * MIB
"""Bytes of one request."""
_THREADS = 8
"""Requests at once."""
_TRIES = 3
"""A file that arrives damaged this often is damaged at its source."""
_SPARE = 64 * MIB
"""Bytes of disk that a copy leaves free."""


@dataclass(frozen=True)
class Listing:
    """Files of a directory in an object store, as they were when it was listed.

    Attributes:
        uri: the directory.
        entries: the files, with CRC32C; their names may have slashes.
    """

    uri: str
    entries: tuple[Entry, ...]

    @property
    def digest(self) -> str:
        """Tells these files from others: a digest of names, sizes and checksums."""
        described = sorted((entry.name, entry.size, entry.crc32c) for entry in self.entries)
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]

    @property
    def names(self) -> frozenset[str]:
        """The files' names."""
        return frozenset(entry.name for entry in self.entries)

    def only(self, names: Iterable[str]) -> Listing:
        """Some of the files."""
        wanted = frozenset(names)
        return Listing(self.uri, tuple(e for e in self.entries if e.name in wanted))


def list_files(uri: str, needed: Callable[[str], bool], *, most: int) -> Listing:
    """What there is at a URI, at any depth: of a directory those files that are needed.

    Args:
        uri: a directory or a single file.
        needed: whether a file is, given its name below the directory.
        most: files of any kind that may be there.

    Raises:
        StorageMissingError: nothing is there.
        StorageError: it cannot be listed, or more files are there.
    """
    entries = open_location(uri).walk(most=most)
    if entries:
        return Listing(uri.rstrip("/"), tuple(e for e in entries if needed(e.name)))
    missing = StorageMissingError(f"there is no object at {uri}, and none below it")
    parent, name = uri.rstrip("/").rsplit("/", 1)
    if parent.endswith("/"):  # a bucket
        raise missing
    try:
        return Listing(parent, (open_location(parent).stat(name),))
    except StorageMissingError:
        raise missing from None


def check_revision(listing: Listing, uri: str, revision: str | None, setting: str) -> None:
    """Compare what was listed with the digest that a setting asks for.

    Raises:
        StorageError: it is another one.
    """
    if revision is not None and revision != listing.digest:
        raise StorageError(
            f"{uri} was changed: its files have the digest {listing.digest}, not {revision}; put"
            f" the former files back, or give --{setting}={listing.digest}"
        )


def local_copy(listing: Listing, cache_dir: str) -> Path:
    """The files as a directory of this machine; fetched by the first process that asks for it.

    Args:
        listing: the files.
        cache_dir: where copies are kept.

    Raises:
        StorageError: a file was changed since it was listed, arrives damaged or cannot be read, or
            the disk has no room or cannot be written.
    """
    parent = Path(in_home(cache_dir), "copies")
    of_this = hashlib.sha256(listing.uri.encode()).hexdigest()[:8]
    directory = parent / f"{of_this}-{listing.digest}"
    if _is_whole(directory, listing):
        return directory
    with os_errors("making a directory in", cache_dir):
        parent.mkdir(parents=True, exist_ok=True)
    path = parent / f".{directory.name}.lock"
    with os_errors("locking", path), open(path, "a+b") as lock:
        if not lock_file(lock, wait=False):
            log.info("waiting for another process that fetches %s, if there is one", listing.uri)
            lock_file(lock, wait=True)
        if not _is_whole(directory, listing):
            _fetch(listing, directory)
    return directory


def _is_whole(directory: Path, listing: Listing) -> bool:
    """Whether a copy is there, with every file at its length."""
    if not directory.is_dir():
        return False
    paths = [(directory / entry.name, entry.size) for entry in listing.entries]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _fetch(listing: Listing, directory: Path) -> None:
    parent, size = directory.parent, sum(entry.size for entry in listing.entries)
    remove_abandoned_scratch(parent)  # a killed process may have left half of a large file
    if directory.exists():
        log.warning("%s is not whole any more; it is fetched again", directory)
        shutil.rmtree(directory, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if size + _SPARE > free:
        raise StorageError(
            f"{listing.uri} has {size / MIB:.0f} MiB, and {parent} has {free / MIB:.0f} MiB free;"
            " free some space or give another --cache_dir"
        )
    log.info(
        "fetching %s: %d files, %.1f MiB, to %s",
        listing.uri,
        len(listing.entries),
        size / MIB,
        directory,
    )
    with scratch_directory("fetch", parent) as scratch, os_errors("writing", directory):
        made = Path(scratch, "made")
        made.mkdir()  # whose mode follows the umask, as that of scratch does not
        remaining = listing.entries
        for _ in range(_TRIES):
            _copy(listing.uri, remaining, made)
            remaining = tuple(e for e in remaining if crc32c_of(made / e.name) != e.crc32c)
            if not remaining:
                break
            log.warning("%s/%s arrived damaged", listing.uri, remaining[0].name)
        else:
            raise StorageError(
                f"{listing.uri}/{remaining[0].name} arrived damaged {_TRIES} times: its content"
                f" does not have the CRC32C {remaining[0].crc32c} that Cloud Storage gives for it"
            )
        for entry in listing.entries:
            with open(made / entry.name, "rb+") as file:
                to_disk(file)
        try:
            os.rename(made, directory)
        except OSError:
            if not _is_whole(directory, listing):  # where nothing can be locked
                raise
        directory_to_disk(parent)


def _copy(uri: str, entries: Iterable[Entry], made: Path) -> None:
    """Copy the versions that were listed, several ranges at once."""
    location = open_location(uri)
    ranges = []
    for entry in entries:
        path = made / entry.name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(entry.size)
        ranges += [(entry, start) for start in range(0, entry.size, _RANGE)]

    def copy(entry: Entry, start: int) -> None:
        try:
            data = location.read_range(entry, start, min(_RANGE, entry.size - start))
        except StorageMissingError:
            raise StorageError(
                f"{uri}/{entry.name} was changed while it was being fetched; start again"
            ) from None
        with open(made / entry.name, "rb+") as file:
            file.seek(start)
            file.write(data)

    with ThreadPoolExecutor(_THREADS, "copies") as pool:
        futures = [pool.submit(copy, *each) for each in ranges]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
