"""A data set as documents: loaded, split into training and validation, without blank rows."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from trainer.models.hugging_face import bucket_advice, looks_local
from trainer.runtime.errors import DataError, UsageError
from trainer.runtime.log import log
from trainer.settings.config import TrainConfig
from trainer.storage.files import check_files, read_regular

VALIDATION_FRACTION = 0.01

_NEAR = 1000
"""Characters in which a whitespace is looked for to cut a document at."""

_BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}

_LOADER_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
"""Those of them that `datasets` takes for itself in a directory."""

_DOCUMENTS_PER_CALL = 256

_CARD_LIMIT = 16 << 20
"""Bytes of a data set's README.md."""


def load_corpus(config: TrainConfig, token: str | None = None) -> Any:
    """The data set as a `datasets.DatasetDict`, by hub name or from a local directory or file.

    Local text files are one document each; rows of json and parquet are documents.

    Raises:
        DataError: it cannot be found or read.
        UsageError: a configuration is asked for of what has none.
    """
    import datasets
    import huggingface_hub.errors
    import yaml

    name = str(config.dataset_name)
    path = os.path.expanduser(name)
    datasets.disable_progress_bars()
    try:
        if os.path.exists(path):
            loaded = _load_local(Path(path), config)
        elif looks_local(name):
            raise DataError(
                f"data set {name!r} cannot be loaded: no such file or directory"
                f"{bucket_advice(name)}"
            )
        else:
            loaded = datasets.load_dataset(
                name, config.dataset_config, revision=config.dataset_revision, token=token
            )
    except yaml.YAMLError as error:
        raise DataError(
            f"data set {name!r}: the YAML at the head of its README.md cannot be read:"
            f" {textwrap.shorten(str(error), 200)}; repair or remove it"
        ) from error
    except (
        OSError,
        ValueError,
        RuntimeError,
        # What `datasets` lets through of damaged descriptions and of files without rows
        LookupError,
        TypeError,
        AttributeError,
        StopIteration,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
        huggingface_hub.errors.HfHubHTTPError,
    ) as error:
        cause = error.__cause__ or error
        reason = textwrap.shorten(str(cause), 300, placeholder=" …") or _unsaid(cause)
        raise DataError(f"data set {name!r} cannot be loaded: {reason}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return loaded


def _unsaid(error: BaseException) -> str:
    return "a split has no rows" if isinstance(error, StopIteration) else type(error).__name__


def _load_local(path: Path, config: TrainConfig) -> Any:
    import datasets

    check_files(path)  # `datasets` would wait at a pipe, and read a device for ever
    saved = path.is_dir() and any(
        (path / name).exists() for name in ("dataset_dict.json", "state.json")
    )
    if config.dataset_config and (saved or path.is_file()):
        raise UsageError(
            f"--dataset_config={config.dataset_config}: {str(path)!r} is"
            f" {'a saved data set' if saved else 'a single file'}, which has no configurations;"
            " leave it out"
        )
    if saved:
        return datasets.load_from_disk(str(path))
    files = corpus_files(path)
    kinds = {_BUILDERS[file.suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise DataError(f"data set {str(path)!r} mixes {' and '.join(sorted(kinds))} files")
    empty = [file for file in files if _is_empty(file)]
    if len(empty) == len(files):
        raise DataError(f"data set {config.dataset_name!r} has no text: {empty[0]} is empty")
    options: dict[str, Any] = {"cache_dir": str(Path(config.cache_dir).expanduser() / "datasets")}
    if kinds == {"text"}:
        options["sample_by"] = "document"
    if path.is_file():
        return datasets.load_dataset(*kinds, data_files=str(path), **options)
    unusual = [file for file in files if file.suffix not in _LOADER_SUFFIXES] + empty
    if unusual and not config.dataset_config and not _describes_files(path):
        return datasets.load_dataset(*kinds, data_files=_split_files(path, empty), **options)
    return datasets.load_dataset(str(path), config.dataset_config, **options)


def _is_empty(file: Path) -> bool:
    size = file.stat().st_size
    return size == 0 or (size < 1024 and not file.read_bytes().strip())


def _describes_files(directory: Path) -> bool:
    """Whether the data set itself says which files are which split."""
    card = directory / "README.md"
    return (directory / ".huggingface.yaml").exists() or (
        card.is_file()
        and bool(re.search(rb"^configs:", read_regular(card, limit=_CARD_LIMIT), re.MULTILINE))
    )


def _split_files(directory: Path, empty: list[Path]) -> dict[str, list[str]]:
    """Files by split, told apart by their names as `datasets` does, without the empty ones.

    Left to itself `datasets` skips suffixes in capitals and stops at a split without rows.

    Raises:
        DataError: no training file has text.
    """
    from datasets.data_files import DataFilesDict, get_data_patterns

    patterns = get_data_patterns(str(directory))
    found = DataFilesDict.from_patterns(patterns, base_path=str(directory))
    known = {
        str(split): [str(file) for file in files if Path(file).suffix.lower() in _BUILDERS]
        for split, files in found.items()
    }
    without = {str(file.resolve()) for file in empty}
    filled = {
        split: [file for file in files if str(Path(file).resolve()) not in without]
        for split, files in known.items()
    }
    if known.get("train") and not filled["train"]:
        raise DataError(
            f"data set {str(directory)!r} has no training text: {known['train'][0]} is empty"
        )
    return {split: files for split, files in filled.items() if files}


def corpus_files(path: Path) -> list[Path]:
    """The readable files of a local data set, sorted.

    Raises:
        DataError: there is none of a known kind.
    """
    candidates = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in candidates if file.is_file() and file.suffix.lower() in _BUILDERS]
    if not files:
        raise DataError(
            f"data set {str(path)!r} has no file of a known kind ({', '.join(sorted(_BUILDERS))})"
        )
    return files


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
    """The texts of a column, in batches; what is not text is empty."""
    for start in range(0, len(rows), _DOCUMENTS_PER_CALL):
        batch = rows[start : start + _DOCUMENTS_PER_CALL][column]
        yield [text if isinstance(text, str) else "" for text in batch]
