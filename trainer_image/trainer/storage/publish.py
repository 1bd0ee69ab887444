"""Outputs of several files: made in scratch space, then renamed or uploaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.runtime.errors import StorageError
from trainer.storage.files import directory_to_disk, in_home, os_errors
from trainer.storage.places import is_empty, is_remote, open_location
from trainer.storage.scratch import remove_abandoned_scratch, scratch_directory


@contextmanager
def publishing(output: str, *, last: str, workdir: Path, replacing: bool = False) -> Iterator[Path]:
    """A new directory to write files into, which are at ``output`` when the block has ended well.

    A new local directory is renamed, so that it is whole or absent. Files that go beside others,
    or to Cloud Storage, follow one another.

    Args:
        output: a local directory or ``gs://`` prefix. Objects that are there may be replaced, but
            not those that another job writes meanwhile.
        last: the file without which nothing reads the others; it comes last.
        workdir: scratch space for what is uploaded.
        replacing: local files of the same names are replaced, and the others stay; else a local
            output has to be absent or empty.

    Raises:
        StorageError: something cannot be written, or somebody else has written there.
    """
    target = Path(in_home(output))
    if not (replacing or is_remote(output) or is_empty(output)):
        raise StorageError(f"{output} is not empty; give a new directory")
    parent = workdir if is_remote(output) else target if replacing else target.parent
    remove_abandoned_scratch(parent)
    with scratch_directory("publish", parent) as scratch:
        made = Path(scratch, "made")
        made.mkdir()  # whose mode follows the umask, as that of scratch does not
        if is_remote(output):
            with _uploading(made, output, last):
                yield made
            return
        yield made
        with os_errors("writing", output):
            _follow_umask(made)
            if replacing:
                for path in _in_order(made, last):
                    os.replace(path, target / path.name)
            else:
                os.rename(made, target)
            directory_to_disk(target if replacing else target.parent)


def _follow_umask(made: Path) -> None:
    """Give files the mode that a plain write gives: some libraries make theirs for the owner alone.

    The mode of a directory made beforehand tells it; asking for the umask itself would set it for
    other threads too.
    """
    mode = made.stat().st_mode & 0o666
    for path in made.rglob("*"):
        if path.is_file() and path.stat().st_mode & 0o777 != mode:
            path.chmod(mode)


@contextmanager
def _uploading(made: Path, output: str, last: str) -> Iterator[None]:
    location = open_location(output)
    location.list()  # what is there now may be replaced
    yield
    folders = {made: location}
    for path in _in_order(made, last):
        folder = path.parent.relative_to(made).as_posix()
        if path.parent not in folders:
            folders[path.parent] = open_location(location.child(folder))
            folders[path.parent].list()
        folders[path.parent].put(path, path.name)


def _in_order(directory: Path, last: str) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return sorted(files, key=lambda path: (path == directory / last, path))
