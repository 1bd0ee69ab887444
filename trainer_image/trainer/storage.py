"""One interface over ``gs://`` prefixes and local directories.

`open_location` gives a `Location`: a flat set of named files below one URI. Writes are atomic (a
name holds its old content or all of the new), checked by CRC32C, and conditional: a location
remembers what each name held when the job first looked and what the job wrote since, and refuses
to replace anything else. Two jobs that share one output therefore cannot silently overwrite each
other; the second ends with a `StorageConflictError` that names the first.

A sidecar names the size and CRC32C of its weights and is written after them (see
`trainer.uploads`). A reader that finds them different (`trainer.checkpoint.verify_file`) came in
between two writes, or to a damaged file; it says so and takes the next best.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import io
import json
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import BinaryIO, Protocol

import google_crc32c

from trainer.errors import StorageError, UsageError
from trainer.log import log

KIB, MIB = 2**10, 2**20
Source = str | os.PathLike[str] | BinaryIO

_BLOCK = 4 * MIB
_LOCK_NAME = ".writers.json"
_WRITERS_LIMIT = 1 << 20
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
# A temporary file this much older than "now" (by the clock of the file system) has no writer that
# is still between creating it and locking it
_ABANDONED_AFTER = 60.0


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

    def difference(self, size: int, crc32c: str) -> str | None:
        """What speaks against this being the file of that size and CRC32C; None if nothing."""
        if self.size != size:
            return f"{self.name} has {self.size} bytes, its sidecar says {size}"
        if self.crc32c is not None and self.crc32c != crc32c:
            return f"{self.name} has CRC32C {self.crc32c}, its sidecar says {crc32c}"
        return None


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
            StorageError: it has more than `limit` bytes.
        """

    def get(self, name: str, destination: Path) -> Entry:
        """Copy a file to a local path, verified, whole or not at all.

        Raises:
            StorageMissingError: there is no such file.
        """

    def put(self, source: Source, name: str) -> Entry:
        """Copy a local file (path, or open for reading) to a name, whole or not at all.

        Raises:
            StorageConflictError: another writer changed that name; its content is left alone.
        """

    def put_bytes(self, data: bytes, name: str) -> Entry:
        """Write a small file. Raises as `put` does."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens if there is none.

        Raises:
            StorageConflictError: another writer changed that name; its content is left alone.
        """

    def check_writable(self) -> None:
        """Fail now, with the reason, if writing later would."""


def is_remote(uri: str) -> bool:
    """Whether a URI lies in Cloud Storage rather than on a local path."""
    return uri.startswith("gs://")


def place(uri: str, path: str) -> str:
    """Where an artifact with a URI and a local path is best read and written.

    Cloud Storage is, by its URI: checked, conditional and resumable, which a mount is not. What
    other stores hold is on the local path.
    """
    return uri if is_remote(uri) else path


def open_location(uri: str, policy: TransferPolicy | None = None) -> Location:
    """A `Location` for ``gs://bucket/prefix`` or a local directory; does no I/O.

    Raises:
        UsageError: the URI has another scheme or is malformed, or google-cloud-storage is missing.
    """
    _check_scheme(uri)
    if not is_remote(uri):
        return LocalLocation(uri)
    from trainer.gcs import BucketLocation

    return BucketLocation(uri, policy or TransferPolicy())


def check_output(uri: str) -> None:
    """Fail now if a directory or prefix could not be written later; leaves nothing behind.

    Args:
        uri: ``gs://`` prefix or local directory, which need not exist.

    Raises:
        UsageError: the URI has another scheme or is malformed.
        StorageError: it cannot be made or written.
    """
    _check_scheme(uri)
    if is_remote(uri):
        open_location(uri).check_writable()
        return
    there = Path(uri)
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent  # what is missing is made when it is needed
    open_location(str(there)).check_writable()


def split_uri(uri: str) -> tuple[str, str]:
    """A file's URI as the URI of its location and its name there.

    Raises:
        UsageError: the URI has another scheme or names no file.
    """
    _check_scheme(uri)
    parent, slash, name = uri.rpartition("/")
    if not name or (is_remote(uri) and parent in ("gs:", "gs:/")):
        raise UsageError(f"{uri!r} names no file; write the full path of one")
    if is_remote(uri):
        return parent, name
    return parent or slash or ".", name


def fetch(uri: str, destination: str | os.PathLike[str]) -> Path:
    """A file of either kind as a local path: an object is copied, a local file stays in place.

    Args:
        uri: one file.
        destination: where an object goes: a file, or an existing directory for one of its name.

    Raises:
        StorageMissingError: there is no such file.
        StorageError: it cannot be read or the copy cannot be written.
        UsageError: the URI is malformed.
    """
    parent, name = split_uri(uri)
    if not is_remote(uri):
        path = Path(uri).expanduser()
        with os_errors("reading", path):
            if not path.is_file():
                code = errno.EISDIR if path.is_dir() else errno.ENOENT
                raise OSError(code, os.strerror(code))
        return path
    target = Path(destination)
    if target.is_dir():
        target /= check_name(name)
    open_location(parent).get(name, target)
    return target


def read_bytes(uri: str, *, limit: int) -> bytes:
    """The content of one small file. Raises as `Location.read_bytes` does."""
    parent, name = split_uri(uri)
    return open_location(parent).read_bytes(name, limit=limit)


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
        try:
            yield check_name(name)
        except StorageError as error:
            if not name.startswith(".") or name.strip(".") == "":
                log.warning("%s: ignored: %s", uri, error)


def crc32c_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    """The CRC32C of a file (an open one is read from its start), in base64, big-endian.

    Raises:
        StorageError: the file cannot be read.
    """
    with os_errors("reading", _shown(source)), opened(source) as file:
        checksum = google_crc32c.Checksum()
        file.seek(0)
        while block := file.read(_BLOCK):
            checksum.update(block)
        file.seek(0)
    return base64.b64encode(checksum.digest()).decode("ascii")


def crc32c_of_bytes(data: bytes) -> str:
    """The CRC32C of bytes in memory, in base64, big-endian."""
    return base64.b64encode(google_crc32c.Checksum(data).digest()).decode("ascii")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that gets its final name when the block ends, and never if it fails.

    The content goes to a hidden file of a unique name in the same directory, is forced to disk and
    renamed. Missing directories are made.

    Raises:
        StorageError: the disk is full, the directory is read-only, and so on.
    """
    path = Path(path)
    with os_errors("writing", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_beside(path) as file:
            try:
                yield file
            except RuntimeError as error:
                # torch.save hides the disk's error behind one about its own position in the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            _to_disk(file)
            os.replace(file.name, path)
        _directory_to_disk(path.parent)


def remove_abandoned(directory: str | os.PathLike[str]) -> None:
    """Remove what killed writers left half-written in a directory.

    A running writer holds a lock on its temporary file; one that can be locked has lost it.
    """
    with os_errors("cleaning", directory), _temporary_beside(Path(directory, "clock")) as probe:
        now = os.fstat(probe.fileno()).st_mtime
        for path in Path(directory).iterdir():
            if _TEMPORARY.fullmatch(path.name) and path != Path(probe.name):
                _remove_if_abandoned(path, now)


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


class LocalLocation:
    """A directory. Writers lock its hidden ``.writers.json``, which says who wrote what."""

    def __init__(self, uri: str) -> None:
        self._root = Path(uri).expanduser()
        self._sightings = Sightings()
        # Own threads: a listing must not see a write that is not yet noted as ours
        self._lock = threading.RLock()

    @property
    def uri(self) -> str:
        """The directory as a path."""
        return str(self._root)

    def child(self, name: str) -> str:
        """The path of a name."""
        return str(self._root / name)

    def list(self) -> list[Entry]:
        """See `Location.list`."""
        entries = []
        with self._lock, os_errors("listing", self._root):
            try:
                found = sorted(item.name for item in os.scandir(self._root) if item.is_file())
            except FileNotFoundError:
                found = []
            for name in usable_names(found, self.uri):
                with contextlib.suppress(FileNotFoundError):
                    entries.append(_entry(self._root / name))
            self._sightings.first_listing(entries)
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
        with os_errors("reading", path), open(path, "rb") as file:
            self._sightings.look(_entry_of_open(name, file))
            data = file.read(limit + 1)
            if len(data) > limit:
                size = os.fstat(file.fileno()).st_size
                raise StorageTooLargeError(
                    f"{path} has {size} bytes; at most {limit} are expected here"
                )
        return data

    def get(self, name: str, destination: Path) -> Entry:
        """See `Location.get`."""
        path = self._root / check_name(name)
        with contextlib.ExitStack() as stack:
            with os_errors("reading", path):
                source = stack.enter_context(open(path, "rb"))
                entry = _entry_of_open(path.name, source)
            with atomic_write(destination) as file:
                crc32c = _copy(source, file)
        self._sightings.look(entry)
        return replace(entry, crc32c=crc32c)

    def put(self, source: Source, name: str) -> Entry:
        """See `Location.put`."""
        path = self._root / check_name(name)
        with os_errors("reading", _shown(source)), contextlib.ExitStack() as stack:
            file = stack.enter_context(opened(source))
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return self._take_over(path, file)
            file.seek(0)
            return self._write(path, file)

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
            _directory_to_disk(self._root)

    def check_writable(self) -> None:
        """Write and remove a small file, and remove what killed writers left behind."""
        with os_errors("writing to", self._root):
            self._root.mkdir(parents=True, exist_ok=True)
            with _temporary_beside(self._root / "probe") as file:
                file.write(b"\0" * 4096)
                _to_disk(file)
        remove_abandoned(self._root)

    def _write(self, path: Path, source: BinaryIO) -> Entry:
        with os_errors("writing", path):
            self._root.mkdir(parents=True, exist_ok=True)
            with _temporary_beside(path) as file:
                crc32c = _copy(source, file)
                _to_disk(file)
                with self._lock, self._writers() as writers:
                    self._check_unchanged(path, writers)
                    os.replace(file.name, path)
                    # Some user-space file systems give a renamed file another inode or time
                    entry = _entry(path)
                    writers[path.name] = describe_writer()
                    self._sightings.wrote(path.name, entry.generation)
            _directory_to_disk(self._root)
        return replace(entry, crc32c=crc32c)

    def _take_over(self, path: Path, file: BinaryIO) -> Entry:
        """The file is already in place: written here by `atomic_write`, it only gets its owner."""
        with self._lock, self._writers() as writers:
            entry = _entry_of_open(path.name, file)
            writers[path.name] = describe_writer()
            self._sightings.wrote(path.name, entry.generation)
        return replace(entry, crc32c=crc32c_of(file))

    def _check_unchanged(self, path: Path, writers: dict[str, str]) -> None:
        try:
            there = _entry(path)
        except FileNotFoundError:
            return  # nothing that could be overwritten
        if there.generation != self._sightings.expected(path.name):
            writer = writers.get(path.name, "a writer that left no name")
            raise conflict(str(path), str(writer), there.updated)

    @contextmanager
    def _writers(self) -> Iterator[dict[str, str]]:
        """The lock on the directory and, to be changed, who wrote each of its files."""
        # Behind a link it would be somebody else's file that is written to
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        handle = os.open(self._root / _LOCK_NAME, flags, 0o666)
        with open(handle, "r+b") as file:
            _lock_file(file, wait=True)
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


def conflict(uri: str, writer: str, updated: float) -> StorageConflictError:
    """The error for a name that somebody else wrote."""
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(updated))
    # Whoever may write there may put anything into the name
    shown = "".join(letter for letter in writer if letter.isprintable())[:200]
    return StorageConflictError(
        f"{uri} was written by another job ({shown}, {when}) since this one"
        f" ({describe_writer()}) looked; it is left as it is: give each job its own output"
    )


@contextmanager
def opened(source: Source) -> Iterator[BinaryIO]:
    """A path opened for reading, or the open file itself, which stays open."""
    if isinstance(source, (str, os.PathLike)):
        with os_errors("reading", source):
            file = open(source, "rb")  # noqa: SIM115
        with file:
            yield file
    else:
        yield source


def _shown(source: Source) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "name", "a file"))


def _check_scheme(uri: str) -> None:
    scheme, separator, _ = uri.partition("://")
    if not uri or "\0" in uri or (separator and scheme != "gs"):
        raise UsageError(f"{uri!r} is neither gs://bucket/path nor a local path")


def _entry(path: Path) -> Entry:
    return _entry_from(path.name, path.stat())


def _entry_of_open(name: str, file: BinaryIO) -> Entry:
    return _entry_from(name, os.fstat(file.fileno()))


def _entry_from(name: str, status: os.stat_result) -> Entry:
    # Atomic writes make a new inode each time; its time tells apart those that reuse a number
    generation = (status.st_mtime_ns << 64) | status.st_ino
    return Entry(name, status.st_size, None, generation, status.st_mtime)


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    checksum = google_crc32c.Checksum()
    while block := source.read(_BLOCK):
        checksum.update(block)
        target.write(block)
    return base64.b64encode(checksum.digest()).decode("ascii")


@contextmanager
def _temporary_beside(path: Path) -> Iterator[BinaryIO]:
    """A new locked file in the directory of a path, removed at the end unless it was renamed."""
    name = path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with open(name, "x+b") as file:
            _lock_file(file, wait=True)
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _lock_file(file: BinaryIO, *, wait: bool) -> bool:
    """Lock an open file until it is closed; False if it is taken or cannot be locked here."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network and user-space file systems have no locks
        if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL):
            raise
        return False
    return True


def _remove_if_abandoned(path: Path, now: float) -> None:
    # Another process may clean at the same time, or a writer may finish
    with contextlib.suppress(FileNotFoundError):
        if now - path.stat().st_mtime < _ABANDONED_AFTER:
            return
        with open(path, "rb") as file:
            if _lock_file(file, wait=False):
                log.info("removing %s, left half-written by a process that is gone", path)
                path.unlink()


def _to_disk(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _directory_to_disk(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Not every file system can force a directory; the rename itself was done
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


@contextmanager
def os_errors(action: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the operating system's errors into one line: what was done to what, and why not."""
    try:
        yield
    except OSError as error:
        what = f"{action} {os.fspath(path)!r} failed"
        if error.errno == errno.ENOENT:
            raise StorageMissingError(f"{what}: it does not exist") from None
        if error.errno == errno.ENOTDIR:
            raise StorageMissingError(
                f"{what}: a file stands where a directory is needed"
            ) from None
        raise StorageError(f"{what}: {_reason(error, Path(path))}") from None


def _reason(error: OSError, path: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{_free_space(path)}; free some space or choose another directory"
    if error.errno == errno.EROFS:
        return "the file system is read-only; choose a directory that can be written"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied; check the owner and mode of the directory"
    if error.errno == errno.EISDIR:
        return "it is a directory, not a file"
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        return "a file is in the way of a directory of that name"
    return error.strerror or str(error)


def _free_space(path: Path) -> str:
    for directory in (path, *path.parents):
        if directory.is_dir():
            return f" ({shutil.disk_usage(directory).free / MIB:.0f} MiB free)"
    return ""


@cache
def _host_name() -> str:
    return socket.gethostname()
