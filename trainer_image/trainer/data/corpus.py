"""A data set as documents: loaded, split into training and validation, without blank rows."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.local_files import LocalData, load_bounded, readable_errors
from trainer.data.remote_data import fetch_data
from trainer.models.hugging_face import looks_local
from trainer.runtime.errors import DataError
from trainer.runtime.log import log
from trainer.settings.config import TrainConfig
from trainer.storage.files import in_home, os_errors, status_of
from trainer.storage.places import is_remote

VALIDATION_FRACTION = 0.01

_NEAR = 1000
"""Characters in which a whitespace is looked for to cut a document at."""

_DOCUMENTS_PER_CALL = 256


def load_corpus(config: TrainConfig, token: str | None = None) -> Any:
    """The data set as a `datasets.DatasetDict`, by hub name or from a directory or file.

    Local text files are one document each; rows of json and parquet are documents.

    Raises:
        DataError: it cannot be found or read.
        StorageError: a file of it is a pipe, a socket or a device, or cannot be read or fetched.
        UsageError: a configuration is asked for of what has none.
    """
    import datasets

    name = str(config.dataset_name)
    path = str(fetch_data(config)) if is_remote(name) else in_home(name)
    with os_errors("reading", path):
        found = status_of(path)
    datasets.disable_progress_bars()
    with readable_errors(name):
        if found is not None:
            cache = str(Path(in_home(config.cache_dir)) / "datasets")
            loaded = load_bounded(LocalData(path, name, config.dataset_config, cache))
        elif looks_local(name):
            raise DataError(f"data set {name!r} cannot be loaded: {_nowhere(name)}")
        else:
            loaded = datasets.load_dataset(
                name, config.dataset_config, revision=config.dataset_revision, token=token
            )
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return loaded


def _nowhere(name: str) -> str:
    if re.match("(?i)(https?|ftp)://", name):
        return "it is a web address; download it and give the file"
    return "no such file or directory"


def split_corpus(config: TrainConfig, corpus: Any) -> tuple[Any, Any, str]:
    """Train rows, validation rows and a sentence on where the latter come from.

    Raises:
        DataError: there is no text to train on, or too little to hold any out.
    """
    import datasets

    train = _rows_with_text(config, "train", corpus["train"])
    if not len(train):
        column = config.text_column
        raise DataError(
            f"data set {config.dataset_name!r}, split 'train': column {column!r} (of type"
            f" {_column_type(train, column)}) holds no text; give --text_column"
        )
    for name in ("validation", "test"):
        if name in corpus and len(corpus[name]):
            rows = _rows_with_text(config, name, corpus[name])
            if len(rows):
                return train, rows, f"the data set's {name} split"
    if len(train) == 1:
        head, tail = _cut(config, train[0][config.text_column])
        policy = f"the last 1 % ({len(tail)} characters) of the only document of train"
        parts = [datasets.Dataset.from_dict({config.text_column: [text]}) for text in (head, tail)]
        return parts[0], parts[1], policy
    held_out = max(1, math.ceil(len(train) * VALIDATION_FRACTION))
    order = np.random.default_rng(0).permutation(len(train))
    policy = (
        f"{held_out} documents (1 %) drawn from train, which has no validation or test beside it"
    )
    return train.select(np.sort(order[held_out:])), train.select(np.sort(order[:held_out])), policy


def _rows_with_text(config: TrainConfig, split: str, rows: Any) -> Any:
    """The rows of a split that are neither null nor blank, with their text column alone."""
    column = config.text_column
    if column not in rows.column_names:
        raise DataError(
            f"data set {config.dataset_name!r}, split {split!r}: it has no column {column!r}; it"
            f" has {', '.join(rows.column_names)}; give --text_column"
        )
    rows = rows.select_columns([column])
    texts = (text for batch in documents(rows, column) for text in batch)
    kept = np.flatnonzero(np.fromiter((bool(text.strip()) for text in texts), bool, len(rows)))
    dropped = len(rows) - len(kept)
    if dropped > len(rows) / 2:
        log.warning(
            "data set %s, split %s: %d of %d rows have no text in column %r (of type %s) and are"
            " left out",
            config.dataset_name,
            split,
            dropped,
            len(rows),
            column,
            _column_type(rows, column),
        )
    return rows.select(kept) if dropped else rows


def _column_type(rows: Any, column: str) -> str:
    feature = rows.features[column]
    return str(getattr(feature, "dtype", feature))


def _cut(config: TrainConfig, text: str) -> tuple[str, str]:
    """A document and its last 1 %, cut before a whitespace where there is one near."""
    end = len(text.rstrip())
    place = end - max(1, math.ceil(end * VALIDATION_FRACTION))
    near = range(place, max(0, place - _NEAR), -1)
    place = next((index for index in near if text[index].isspace()), place)
    if not text[:place].strip():
        raise DataError(
            f"data set {config.dataset_name!r} has one document only, of {end} characters: too few"
            " to hold any out; add a validation split"
        )
    return text[:place], text[place:]


def documents(rows: Any, column: str) -> Iterator[list[str]]:
    """The texts of a column, in batches; what is not text is empty.

    Raises:
        DataError: they are not UTF-8, or damaged.
    """
    for start in range(0, len(rows), _DOCUMENTS_PER_CALL):
        try:
            batch = rows[start : start + _DOCUMENTS_PER_CALL][column]
        except (ValueError, OSError, LookupError, ImportError) as error:
            raise DataError(
                f"column {column!r} of the data set cannot be read as text in rows {start + 1} to"
                f" {min(start + _DOCUMENTS_PER_CALL, len(rows))}: {str(error)[:200]}; write it anew"
                " in UTF-8"
            ) from error
        yield [text if isinstance(text, str) else "" for text in batch]
