"""Exported students: directories that `trainer.export_hf` has written, here or in a bucket."""

from __future__ import annotations

import os

from trainer.models.local_files import CONFIG
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import ModelError
from trainer.storage.base import StorageMissingError
from trainer.storage.files import in_home
from trainer.storage.places import is_remote, open_location


def exported_student(source: str, cache_dir: str) -> Pretrained | None:
    """The model of an exported student, to be loaded as any other.

    Args:
        source: a directory or ``gs://`` prefix, or anything else.
        cache_dir: where files of a ``gs://`` prefix are kept on this machine.

    Returns:
        The model; None where ``source`` is no directory of one.

    Raises:
        ModelError: a local directory that holds no model's configuration.
        StorageError: the bucket does not answer.
    """
    if is_remote(source):
        try:
            open_location(source).stat(CONFIG)  # written last
        except StorageMissingError:
            return None
    elif not os.path.isdir(in_home(source)):
        return None
    elif not os.path.isfile(os.path.join(in_home(source), CONFIG)):
        raise ModelError(
            f"{source} is a directory without {CONFIG}; give a checkpoint in it, best.pt for"
            " example, or a directory of trainer.export_hf"
        )
    return Pretrained(source, cache_dir=cache_dir)
