"""Local files: atomic writes, checksums, and the operating system's errors in one line each."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import google_crc32c

from trainer.runtime.errors import StorageError, UsageError
from trainer.runtime.log import log
from trainer.runtime.messages import brief
from trainer.storage.base import MIB, StorageMissingError, too_large

BLOCK = 4 * MIB

_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")

# A temporary file this much older than "now" (by the clock of the file system) has no writer that
# is still between creating it and locking it
_ABANDONED_AFTER = 60.0

_STATUS_BLOCK = 512
"""Bytes of a block as stat(2) counts them."""

_FICLONE = 0x40049409
"""Linux's request for a reflink, ioctl_ficlone(2); Python names it from 3.12 on."""


_KINDS = {
    stat.S_IFDIR: (errno.EISDIR, "it is a directory, not a file"),
    stat.S_IFIFO: (errno.EINVAL, "it is a pipe, not a file"),
    stat.S_IFSOCK: (errno.EINVAL, "it is a socket, not a file"),
    stat.S_IFCHR: (errno.EINVAL, "it is a device, not a file"),
    stat.S_IFBLK: (errno.EINVAL, "it is a device, not a file"),
}
"""What else a path may lead to, and the error for it."""


def in_home(path: str, named: str | None = None) -> str:
    """A path with ``~`` and ``~NAME`` written out.

    Args:
        path: as a user gives it.
        named: what the message calls it; default is the path itself.

    Raises:
        UsageError: there is no such home directory.
    """
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # no user's name has such characters
        expanded = path
    if expanded.startswith("~"):
        raise UsageError(
            f"{named or brief(path)}: there is no such home directory; write the path out"
        )
    return expanded


def status_of(path: str | os.PathLike[str]) -> os.stat_result | None:
    """What is at a path, links followed; None where nothing is.

    `os.path.exists` says of what may not be looked at that it is not there.

    Raises:
        OSError: it may not be looked at, for example.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def open_regular(path: str | os.PathLike[str], *, limit: int | None = None) -> BinaryIO:
    """Open a stored file for reading; a link to one is followed.

    Pipes, sockets, devices and what the system makes up as it is read are refused, without waiting
    for a writer and before anything is read.

    Args:
        path: the file.
        limit: bytes that it may have; None where the caller reads no more than the size says.

    Raises:
        OSError: it cannot be opened, or is something else than a file; says what.
        StorageTooLargeError: it has more bytes.
    """

    def opened(name: str, flags: int) -> int:
        check_regular(os.stat(name))  # before opening, which is enough to make some devices act
        return os.open(name, flags | os.O_NONBLOCK | os.O_NOCTTY)

    try:
        file = open(path, "rb", opener=opened)  # noqa: SIM115
    except ValueError:
        raise OSError(errno.EINVAL, "its path has a NUL character") from None
    try:
        status = os.fstat(file.fileno())
        check_regular(status)
        if not status.st_size and os.pread(file.fileno(), 1, 0):
            raise OSError(errno.EINVAL, "its content is made up by the system, it is no file")
        if limit is not None and status.st_size > limit:
            raise too_large(os.fspath(path), status.st_size, limit)
    except BaseException:  # a signal's too
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike[str], *, limit: int) -> bytes:
    """The content of a small file. Raises as `open_regular` does."""
    with open_regular(path, limit=limit) as file:
        return read_whole(file, path, limit=limit)


def read_whole(file: BinaryIO, path: str | os.PathLike[str], *, limit: int) -> bytes:
    """What an open file holds, also where it grows meanwhile.

    Raises:
        StorageTooLargeError: that is more than ``limit`` bytes.
    """
    data = file.read(limit + 1)
    if len(data) > limit:
        raise too_large(os.fspath(path), max(len(data), os.fstat(file.fileno()).st_size), limit)
    return data


def check_regular(status: os.stat_result) -> None:
    """Refuse what is no file.

    Raises:
        OSError: says what it is.
    """
    if not stat.S_ISREG(status.st_mode):
        kind = stat.S_IFMT(status.st_mode)
        raise OSError(*_KINDS.get(kind, (errno.EINVAL, "it is no file")))


def check_files(*paths: Path) -> None:
    """Check that libraries may open these paths, of which some may be directories.

    Files of holes are refused: they take no space and claim any size, by which the libraries'
    memory and time are bounded.

    Raises:
        StorageError: names the pipe, socket, device or file of holes among them.
    """
    for path in paths:
        # A link to nothing cannot be opened, so that nobody waits at it
        if path.exists() and not path.is_dir():
            with os_errors("reading", path):
                status = path.stat()
                check_regular(status)
                _check_holes(path, status)


def _check_holes(path: Path, status: os.stat_result) -> None:
    if status.st_blocks * _STATUS_BLOCK * 2 >= status.st_size:
        return
    with open_regular(path) as file:
        # A file system that compresses has fewer blocks too, but no holes
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) < status.st_size:
            raise OSError(
                errno.EINVAL,
                f"most of its {status.st_size} bytes were never written (it is sparse); write it"
                " anew, or give another",
            )


class Checksummed:
    """Writes to a binary file and computes the CRC32C of what passes.

    Args:
        file: open for writing; written to from one end to the other.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._checksum = google_crc32c.Checksum()

    def write(self, data: bytes | memoryview) -> int:
        """Write bytes; returns how many."""
        view = memoryview(data)
        for start in range(0, len(view), BLOCK):
            self._checksum.update(bytes(view[start : start + BLOCK]))
        return self._file.write(data)

    def flush(self) -> None:
        """Pass on to the operating system what is buffered."""
        self._file.flush()

    @property
    def crc32c(self) -> str:
        """Of everything written so far, in base64, big-endian."""
        return _as_text(self._checksum)


def crc32c_of(source: str | os.PathLike[str] | BinaryIO) -> str:
    """The CRC32C of a file (an open one is read from its start), in base64, big-endian.

    Raises:
        StorageError: the file cannot be read.
    """
    if isinstance(source, (str, os.PathLike)):
        with os_errors("reading", source), open_regular(source) as file:
            return crc32c_of(file)
    checksum = google_crc32c.Checksum()
    source.seek(0)
    while block := source.read(BLOCK):
        checksum.update(block)
    source.seek(0)
    return _as_text(checksum)


def crc32c_of_bytes(data: bytes) -> str:
    """The CRC32C of bytes in memory, in base64, big-endian."""
    return _as_text(google_crc32c.Checksum(data))


def _as_text(checksum: google_crc32c.Checksum) -> str:
    return base64.b64encode(checksum.digest()).decode("ascii")


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
        with temporary_beside(path) as file:
            try:
                yield file
            except RuntimeError as error:
                # torch.save hides the disk's error behind one about its own position in the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            to_disk(file)
            os.replace(file.name, path)
        directory_to_disk(path.parent)


def remove_abandoned(directory: str | os.PathLike[str]) -> None:
    """Remove what killed writers left half-written in a directory.

    A running writer holds a lock on its temporary file; one that can be locked has lost it.
    """
    with os_errors("cleaning", directory), temporary_beside(Path(directory, "clock")) as probe:
        now = os.fstat(probe.fileno()).st_mtime
        for path in Path(directory).iterdir():
            if _TEMPORARY.fullmatch(path.name) and path != Path(probe.name):
                _remove_if_abandoned(path, now)


@contextmanager
def temporary_beside(path: Path) -> Iterator[BinaryIO]:
    """A new locked file in the directory of a path, removed at the end unless it was renamed."""
    name = _temporary_name(path)
    try:
        with open(name, "x+b") as file:
            lock_file(file, wait=True)
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _temporary_name(path: Path) -> Path:
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def share_content(source: BinaryIO, temporary: BinaryIO, path: Path) -> bool:
    """Let a temporary file's name stand for a file's content without copying its bytes.

    By a reflink, which keeps the two apart from then on, else by a hard link.

    Args:
        source: the open file.
        temporary: of `temporary_beside`.
        path: that of ``source``.

    Returns:
        False where the file system has neither; the temporary file is empty then, as before.
    """
    with contextlib.suppress(OSError):
        fcntl.ioctl(temporary.fileno(), _FICLONE, source.fileno())
        to_disk(temporary)
        return True
    # The link has the age of its source: locked, it is no abandoned file
    lock_file(source, wait=True)
    link = _temporary_name(path)
    with contextlib.suppress(OSError):
        os.link(path, link)
        os.replace(link, temporary.name)
        return True
    return False


def lock_file(file: BinaryIO, *, wait: bool) -> bool:
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
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or now - status.st_mtime < _ABANDONED_AFTER:
            return
        with open_regular(path) as file:
            if lock_file(file, wait=False):
                log.info("removing %s, left half-written by a process that is gone", path)
                path.unlink()


def to_disk(file: BinaryIO) -> None:
    """Force an open file's content to disk."""
    file.flush()
    os.fsync(file.fileno())


def directory_to_disk(directory: Path) -> None:
    """Force a directory's entries to disk, where its file system can."""
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
        return "permission denied; check owner and mode of the file and its directories"
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
