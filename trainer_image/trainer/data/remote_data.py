"""Data sets in an object store: what of a directory is needed, and which version is meant."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path, PurePosixPath

from trainer.data.local_files import BUILDERS
from trainer.runtime.errors import DataError
from trainer.settings.config import TrainConfig
from trainer.storage.copies import Listing, check_revision, list_files, local_copy
from trainer.storage.places import is_remote

_SUFFIXES = (*BUILDERS, ".arrow")
"""Those of the files that are fetched; Arrow is how `datasets` saves a data set."""
_CARD = "README.md"

_MOST_FILES = 100_000


def pinned(config: TrainConfig) -> TrainConfig:
    """The settings with the revision of a data set in an object store, which its files tell.

    Raises:
        DataError: no file of a known kind is there.
        StorageError: it cannot be listed, or is not of the revision that the settings give.
    """
    if not is_remote(str(config.dataset_name)):
        return config
    return replace(config, dataset_revision=_listing(config).digest)


def fetch_data(config: TrainConfig) -> Path:
    """A data set of an object store as a directory or file of this machine.

    Raises:
        DataError: no file of a known kind is there.
        StorageError: it cannot be listed or fetched, or is not of the revision that the settings
            give.
    """
    listing = _listing(config)
    directory = local_copy(listing, config.cache_dir)
    single = listing.uri != str(config.dataset_name).rstrip("/")
    return directory / listing.entries[0].name if single else directory


def _listing(config: TrainConfig) -> Listing:
    name = str(config.dataset_name)
    listing = list_files(name, _is_needed, most=_MOST_FILES)
    if not any(_is_data(file) for file in listing.names):
        raise DataError(
            f"data set {name!r} has no file of a known kind ({', '.join(sorted(BUILDERS))})"
        )
    check_revision(listing, name, config.dataset_revision, "dataset_revision")
    return listing


def _is_needed(name: str) -> bool:
    return name == _CARD or _is_data(name)


def _is_data(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in _SUFFIXES
