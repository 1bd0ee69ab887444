"""One interface over ``gs://`` prefixes and local directories.

`open_location` gives a `Location`: a flat set of named files below one URI. Writes are atomic (a
name holds its old content or all of the new), checked by CRC32C, and conditional: a location
remembers what each name held when the job first looked and what the job wrote since, and refuses
to replace anything else. Two jobs that share one output therefore cannot silently overwrite each
other; the second ends with a `StorageConflictError` that names the first. Before each snapshot a
job claims its location, which decides between two that write in turns.

A sidecar names the size and CRC32C of its weights and is written after them (see
`trainer.checkpoints.snapshots`). A reader that finds them different
(`trainer.checkpoints.sidecar.verify_file`) came in between two writes, or to a damaged file; it
says so and takes the next best.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.runtime.errors import StorageError, UsageError
from trainer.runtime.log import log
from trainer.storage.base import Location, TransferPolicy, check_name
from trainer.storage.files import check_regular, in_home, open_regular, os_errors
from trainer.storage.local import LocalLocation
from trainer.storage.scratch import remove_abandoned_scratch, scratch_directory


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

    An object store with a backend is used by its URI: its transfers are checked, conditional and
    resumable, those of a mount are not. For every other store it is the local path.
    """
    return uri if is_remote(uri) else path


def shared_place(uri: str, path: str) -> str:
    """As `place`, for an artifact that tasks on other machines find by this place alone.

    Raises:
        UsageError: it lies in a store that has no backend, so its local path is this machine's.
    """
    if "://" in uri and not is_remote(uri):
        raise UsageError(
            f"{uri}: other machines cannot read it there; set PIPELINE_ROOT to gs://BUCKET/PREFIX,"
            " or give teacher=online"
        )
    return place(uri, path)


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
    directory = Path(in_home(uri))
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


def fetch(uri: str, destination: Path, *, limit: int | None = None) -> tuple[Path, str | None]:
    """A file of either kind as a local path: an object is copied, a local file stays in place.

    Args:
        uri: one file.
        destination: where an object goes: a file, or an existing directory for one of its name.
        limit: bytes that it may have.

    Returns:
        The path, and the CRC32C of its content where copying has told it.

    Raises:
        StorageMissingError: there is no such file.
        StorageTooLargeError: it has more bytes.
        StorageError: it cannot be read, is no file, or the copy cannot be written.
        UsageError: the URI is malformed.
    """
    parent, name = split_uri(uri)
    if not is_remote(uri):
        path = Path(in_home(uri))
        with os_errors("reading", path), open_regular(path, limit=limit):
            return path, None
    if destination.is_dir():
        destination /= check_name(name)
    return destination, open_location(parent).get(name, destination, limit=limit).crc32c


def fetch_directory(uri: str, names: Sequence[str], workdir: Path, *, limit: int) -> Path:
    """Files of a directory as local paths: a local one stays in place, objects are copied once.

    Args:
        uri: a local directory or ``gs://`` prefix.
        names: the files; the last one vouches for the others and tells them from other versions.
        workdir: where copies are kept, of each directory the latest version.
        limit: bytes of the last file.

    Raises:
        StorageError: a file cannot be read, or its copy not be written.
    """
    if not is_remote(uri):
        return Path(in_home(uri))
    location = open_location(uri)
    version = location.read_bytes(names[-1], limit=limit)
    of_this = f"fetched-{hashlib.sha256(uri.encode()).hexdigest()[:8]}"
    directory = workdir / f"{of_this}-{hashlib.sha256(version).hexdigest()[:16]}"
    if (directory / names[-1]).exists():
        return directory
    remove_abandoned_scratch(workdir)  # a killed process may have left half of a large file
    with scratch_directory("fetch", workdir) as scratch, os_errors("writing", directory):
        for name in names:
            location.get(name, Path(scratch, name))
        if Path(scratch, names[-1]).read_bytes() != version:
            raise StorageError(f"{uri} was changed while it was being fetched; start again")
        directory.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(scratch, name), directory / name)
    for other in workdir.glob(f"{of_this}-*"):
        if other != directory:
            log.info("removing %s, an older version of %s", other, uri)
            shutil.rmtree(other, ignore_errors=True)
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
    directory = Path(in_home(uri))
    return not directory.exists() or (directory.is_dir() and not any(directory.iterdir()))


def check_output_file(uri: str) -> None:
    """Fail now if a file could not be written later; leaves nothing behind.

    Raises:
        UsageError: the URI is malformed, or a directory's.
        StorageError: the file has no possible name, a pipe or a device has it, or its directory
            cannot be written.
    """
    parent, name = split_uri(uri)
    if is_remote(uri):
        check_name(name)
    elif (path := Path(in_home(uri))).is_dir():
        raise UsageError(f"{uri!r} is a directory; give the path of the file to write")
    elif path.exists():
        with os_errors("writing to", path):
            check_regular(path.stat())  # a file would take the place of a device
    check_output(parent)


def working_directory(uri: str, workdir: Path) -> Path:
    """Where files on their way to a location are made.

    For a directory that is the directory itself: its files only need a rename, and the disk that
    fills up is the one that is named.
    """
    return workdir if is_remote(uri) else Path(in_home(uri))


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
