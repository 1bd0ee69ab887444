"""Local files as a data set; first read in a child process, since native code parses them."""

from __future__ import annotations

import contextlib
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.runtime.bounded import MEMORY, SECONDS, BoundedError, BoundedProcess
from trainer.runtime.errors import DataError, UsageError
from trainer.storage.files import check_files, read_regular

BUILDERS = {
    ".txt": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}
"""By the suffix of a file, what `datasets` calls its kind."""

_LOADER_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
"""Those of them that `datasets` takes for itself in a directory."""

_MEMORY_PER_BYTE = 8
"""Of the largest file: whole text files are in memory as bytes, as text and as Arrow."""
_CARD_LIMIT = 16 << 20
"""Bytes of a data set's README.md."""
_LARGEST_TEXT = (1 << 31) - 1
"""Bytes of a text in Arrow."""
_BYTES_PER_SECOND = 1 << 20
"""The least that a slow machine reads in a second."""


@dataclass(frozen=True)
class LocalData:
    """A data set in a local directory or file.

    Attributes:
        path: where it is.
        name: what messages call it.
        configuration: which of its configurations.
        cache: the directory where `datasets` keeps what it has read.
    """

    path: str
    name: str
    configuration: str | None
    cache: str


@contextlib.contextmanager
def readable_errors(name: str) -> Iterator[None]:
    """Raise a `DataError` of one line for a data set that cannot be found or read."""
    import datasets
    import huggingface_hub.errors
    import pyarrow
    import yaml

    try:
        yield
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
        pyarrow.ArrowException,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
        huggingface_hub.errors.HfHubHTTPError,
        BoundedError,
    ) as error:
        cause = error.__cause__ or error
        reason = textwrap.shorten(str(cause), 300, placeholder=" …") or _unsaid(cause)
        unknown = reason.startswith("BuilderConfig ")
        hint = "; give --dataset_config with one of them, or leave it out" if unknown else ""
        raise DataError(f"data set {name!r} cannot be loaded: {reason}{hint}") from error


def _unsaid(error: BaseException) -> str:
    return "a split has no rows" if isinstance(error, StopIteration) else type(error).__name__


def load_bounded(data: LocalData) -> Any:
    """`load`, after a child process has done the same within bounded memory and time.

    The child leaves in the cache what it has read, so the second time is only a look at that.

    Raises:
        BoundedError: reading it takes too much, or crashes.
        DataError: it cannot be read.
        StorageError: a file of it is a pipe, a socket or a device.
        UsageError: a configuration is asked for of what has none.
    """
    files = _every_file(Path(data.path))
    check_files(*files)
    sizes = [file.stat().st_size for file in files]
    memory = MEMORY + _MEMORY_PER_BYTE * max(sizes, default=0)
    with BoundedProcess(f"{__name__}:answer", memory=memory) as child:
        request = json.dumps(asdict(data)).encode()
        child.ask(request, seconds=SECONDS + sum(sizes) / _BYTES_PER_SECOND)
    return load(data)


def _every_file(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    return [file for file in path.rglob("*") if not file.is_dir() and file.exists()]


def answer(request: bytes) -> bytes:
    """Read the data set of a request in the child; the answer is empty."""
    import datasets

    data = LocalData(**json.loads(request))
    datasets.disable_progress_bars()
    with readable_errors(data.name):
        loaded = load(data)
        if _is_saved(Path(data.path)):
            # Foreign Arrow files are mapped as they are; the others are of our own making
            parts = loaded.values() if isinstance(loaded, dict) else [loaded]
            for part in parts:
                for batch in part.data.to_batches():
                    batch.validate(full=True)
    return b""


def _is_saved(path: Path) -> bool:
    return path.is_dir() and any(
        (path / name).exists() for name in ("dataset_dict.json", "state.json")
    )


def load(data: LocalData) -> Any:
    """The data set as `datasets` has it.

    Raises:
        DataError: there is no file of a known kind, or files of several, or no text.
        UsageError: a configuration is asked for of what has none.
    """
    import datasets

    path = Path(data.path)
    saved = _is_saved(path)
    if data.configuration and (saved or path.is_file()):
        raise UsageError(
            f"--dataset_config={data.configuration}: {str(path)!r} is"
            f" {'a saved data set' if saved else 'a single file'}, which has no configurations;"
            " leave it out"
        )
    if saved:
        return datasets.load_from_disk(str(path))
    files = corpus_files(path)
    kinds = {BUILDERS[file.suffix.lower()] for file in files}
    if len(kinds) > 1:
        raise DataError(f"data set {data.name!r} mixes {' and '.join(sorted(kinds))} files")
    empty = [file for file in files if _is_empty(file)]
    if len(empty) == len(files):
        raise DataError(f"data set {data.name!r} has no text: {empty[0]} is empty")
    if kinds == {"text"}:
        _check_sizes(data, files)
    options: dict[str, Any] = {"cache_dir": data.cache}
    if kinds == {"text"}:
        options["sample_by"] = "document"
    if path.is_file():
        return datasets.load_dataset(*kinds, data_files=str(path), **options)
    unusual = [file for file in files if file.suffix not in _LOADER_SUFFIXES] + empty
    if unusual and not data.configuration and not _describes_files(path):
        return datasets.load_dataset(*kinds, data_files=_split_files(path, empty), **options)
    return datasets.load_dataset(str(path), data.configuration, **options)


def _check_sizes(data: LocalData, files: list[Path]) -> None:
    for file in files:
        if (size := file.stat().st_size) > _LARGEST_TEXT:
            raise DataError(
                f"data set {data.name!r} cannot be loaded: {file.name} has {size} bytes, and a text"
                f" file is one document, of at most {_LARGEST_TEXT}; divide it"
            )


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
        str(split): [str(file) for file in files if Path(file).suffix.lower() in BUILDERS]
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
    files = [file for file in candidates if file.is_file() and file.suffix.lower() in BUILDERS]
    if not files:
        raise DataError(
            f"data set {str(path)!r} has no file of a known kind ({', '.join(sorted(BUILDERS))})"
        )
    return files
