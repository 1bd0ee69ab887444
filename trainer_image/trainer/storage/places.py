"""One interface over ``gs://`` prefixes and local directories.

`open_location` gives a `Location`: a flat set of named files below one URI. Writes are atomic (a
name holds its old content or all of the new), checked by CRC32C, and conditional: a location
remembers what each name held when the job first looked and what the job wrote since, and refuses
to replace anything else. Two jobs that share one output therefore cannot silently overwrite each
other; the second ends with a `StorageConflictError` that names the first.

A sidecar names the size and CRC32C of its weights and is written after them (see
`trainer.checkpoints.snapshots`). A reader that finds them different
(`trainer.checkpoints.sidecar.verify_file`) came in between two writes, or to a damaged file; it
says so and takes the next best.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.runtime.errors import UsageError
from trainer.storage.base import Location, TransferPolicy, check_name
from trainer.storage.files import os_errors
from trainer.storage.local import LocalLocation


def _open_bucket(uri: str, policy: TransferPolicy) -> Location:
    # Its client is an extra, which local paths do not need
    from trainer.storage.gcs import BucketLocation

    return BucketLocation(uri, policy)


BACKENDS: dict[str, Callable[[str, TransferPolicy], Location]] = {"gs": _open_bucket}
"""What opens URIs of each scheme; without a scheme they are local paths."""


def is_remote(uri: str) -> bool:
    """Whether a URI lies in an object store rather than on a local path."""
    scheme, separator, _ = uri.partition("://")
    return bool(separator) and scheme in BACKENDS


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
    check_scheme(uri)
    if not is_remote(uri):
        return LocalLocation(uri)
    return BACKENDS[uri.partition("://")[0]](uri, policy or TransferPolicy())


def check_output(uri: str) -> None:
    """Fail now if a directory or prefix could not be written later; leaves nothing behind.

    Args:
        uri: ``gs://`` prefix or local directory, which need not exist.

    Raises:
        UsageError: the URI has another scheme or is malformed.
        StorageError: it cannot be made or written.
    """
    check_scheme(uri)
    if is_remote(uri):
        open_location(uri).check_writable()
        return
    directory = Path(uri)
    while not os.path.lexists(directory) and directory != directory.parent:
        directory = directory.parent  # what is missing is made when it is needed
    open_location(str(directory)).check_writable()


def split_uri(uri: str) -> tuple[str, str]:
    """A file's URI as the URI of its location and its name there.

    Raises:
        UsageError: the URI has another scheme or names no file.
    """
    check_scheme(uri)
    parent, slash, name = uri.rpartition("/")
    if not name or (is_remote(uri) and "://" not in parent):
        raise UsageError(f"{uri!r} names no file; write the full path of one")
    if is_remote(uri):
        return parent, name
    return parent or slash or ".", name


def fetch(uri: str, destination: Path) -> tuple[Path, str | None]:
    """A file of either kind as a local path: an object is copied, a local file stays in place.

    Args:
        uri: one file.
        destination: where an object goes: a file, or an existing directory for one of its name.

    Returns:
        The path, and the CRC32C of its content where copying has told it.

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
        return path, None
    if destination.is_dir():
        destination /= check_name(name)
    return destination, open_location(parent).get(name, destination).crc32c


def fetch_directory(uri: str, names: Sequence[str], workdir: Path, *, limit: int) -> Path:
    """Files of a directory as local paths: a local one stays in place, objects are copied once.

    Args:
        uri: a local directory or ``gs://`` prefix.
        names: the files; the last one vouches for the others and tells them from other versions.
        workdir: where copies are kept.
        limit: bytes of the last file.

    Raises:
        StorageError: a file cannot be read, or its copy not be written.
    """
    if not is_remote(uri):
        return Path(uri).expanduser()
    location = open_location(uri)
    version = location.read_bytes(names[-1], limit=limit)
    directory = workdir / f"fetched-{hashlib.sha256(uri.encode() + version).hexdigest()[:16]}"
    if not (directory / names[-1]).exists():
        for name in names:
            location.get(name, directory / name)
    return directory


def is_empty(uri: str) -> bool:
    """Whether nothing is at a local directory or ``gs://`` prefix.

    Raises:
        UsageError: the URI has another scheme or is malformed.
        StorageError: it cannot be listed.
    """
    check_scheme(uri)
    if is_remote(uri):
        return not open_location(uri).list()
    directory = Path(uri).expanduser()
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def check_output_file(uri: str) -> None:
    """Fail now if a file could not be written later; leaves nothing behind.

    Raises:
        UsageError: the URI is malformed, or a directory's.
        StorageError: the file has no possible name, or its directory cannot be written.
    """
    parent, name = split_uri(uri)
    if is_remote(uri):
        check_name(name)
    elif Path(uri).is_dir():
        raise UsageError(f"{uri!r} is a directory; give the path of the file to write")
    check_output(parent)


def working_directory(uri: str, workdir: Path) -> Path:
    """Where files on their way to a location are made.

    For a directory that is the directory itself: its files only need a rename, and the disk that
    fills up is the one that is named.
    """
    return workdir if is_remote(uri) else Path(uri).expanduser()


def read_bytes(uri: str, *, limit: int) -> bytes:
    """The content of one small file. Raises as `Location.read_bytes` does."""
    parent, name = split_uri(uri)
    return open_location(parent).read_bytes(name, limit=limit)


def check_scheme(uri: str) -> None:
    """Refuse what is neither ``gs://…`` nor a local path.

    Raises:
        UsageError: another scheme, an empty text or a NUL character.
    """
    scheme, separator, _ = uri.partition("://")
    if not uri or "\0" in uri or (separator and scheme not in BACKENDS):
        raise UsageError(f"{uri!r} is neither gs://bucket/path nor a local path")
