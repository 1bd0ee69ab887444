"""Exported students: directories that `trainer.export_hf` has written, here or in a bucket."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.runtime.errors import ModelError
from trainer.storage.files import in_home
from trainer.storage.places import fetch_directory, is_remote, open_location

CONFIG = "config.json"
"""The model's configuration, written last."""
_LIMIT = 1 << 20
"""Bytes of it."""


def exported_directory(source: str, workdir: Path) -> str | None:
    """The local directory of an exported student, copied from a bucket where it lies in one.

    Args:
        source: a directory or ``gs://`` prefix, or anything else.
        workdir: where copies are kept.

    Returns:
        The directory; None where ``source`` is no directory.

    Raises:
        ModelError: a local directory that holds no model's configuration.
        StorageError: it cannot be listed or copied.
    """
    if is_remote(source):
        names = [entry.name for entry in open_location(source).list()]
        if CONFIG not in names:
            return None
        names.sort(key=lambda name: (name == CONFIG, name))
        workdir.mkdir(parents=True, exist_ok=True)
        return str(fetch_directory(source, names, workdir, limit=_LIMIT))
    directory = in_home(source)
    if not os.path.isdir(directory):
        return None
    if not os.path.isfile(os.path.join(directory, CONFIG)):
        raise ModelError(
            f"{source} is a directory without {CONFIG}; give a checkpoint in it, best.pt for"
            " example, or a directory of trainer.export_hf"
        )
    return directory
