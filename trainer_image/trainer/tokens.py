"""Corpus → token file → windows → batches.

A corpus is tokenized once into one flat stream per split: documents joined by the end-of-text
token, in uint16 where the vocabulary fits, else uint32. A window is ``block_size + 1`` consecutive
tokens, one starting every ``block_size`` tokens, so the stream does not depend on the context.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.config import TrainConfig
from trainer.errors import DataError, ModelError, UsageError
from trainer.log import log, on_terminal
from trainer.storage import is_remote, open_location
from trainer.teacher import bucket_advice, load_tokenizer, looks_local

INFO_NAME = "tokens.json"
TOKENIZER_DIR = "tokenizer"
VALIDATION_FRACTION = 0.01
_NEAR = 1000
"""Characters in which a whitespace is looked for to cut a document at."""
IGNORED = -1
"""Label of a position that fills up an evaluation batch and counts for nothing."""
_FORMAT = 1
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
_DTYPES = ("uint16", "uint32")
_CHECKED_TOKENS, _CHECKED_BLOCK = 1 << 26, 1 << 16
"""How many ids of a stream are looked at when it is opened, and how many of them in a row."""


@dataclass(frozen=True)
class TokenInfo:
    """What a directory of token streams holds (its ``tokens.json``).

    Raises:
        ValueError: naming a value that no token streams can have.
    """

    train_tokens: int
    validation_tokens: int
    vocab_size: int
    """Number of ids the tokenizer can produce."""
    dtype: str
    eos_token_id: int
    tokenizer: str
    dataset: dict[str, Any]
    validation_split: str
    fingerprint: str
    """Digest of the tokens."""
    format: int = _FORMAT
    tokenizer_fingerprint: str = ""
    """See `tokenizer_fingerprint`; empty in what earlier releases wrote."""

    def __post_init__(self) -> None:
        least = {"train_tokens": 2, "validation_tokens": 2, "vocab_size": 1, "eos_token_id": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} is {value!r}, not a whole number of at least {lowest}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, not {' or '.join(_DTYPES)}")
        for name in ("tokenizer", "fingerprint", "tokenizer_fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}, not a text")


@dataclass(frozen=True)
class TokenStreams:
    """Memory-mapped token streams ``[tokens]`` and their description."""

    directory: Path
    info: TokenInfo
    train: np.ndarray
    validation: np.ndarray


# ── corpus ────────────────────────────────────────────────────────────────────────────────────


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
        told = textwrap.shorten(str(cause), 300, placeholder=" …")
        raise DataError(f"data set {name!r} cannot be loaded: {told or _unsaid(cause)}") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return loaded


def _unsaid(error: BaseException) -> str:
    return "a split has no rows" if isinstance(error, StopIteration) else type(error).__name__


def _load_local(path: Path, config: TrainConfig) -> Any:
    import datasets

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
        card.is_file() and bool(re.search(rb"^configs:", card.read_bytes(), re.MULTILINE))
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


# ── tokenizing ────────────────────────────────────────────────────────────────────────────────


def cache_key(config: TrainConfig, tokenizer: Any) -> str:
    """A digest of data set, configuration, revision, text column and tokenizer.

    Local files count by relative name, size and modification time.
    """
    described: list[Any] = [
        _FORMAT,
        config.dataset_name,
        config.dataset_config,
        config.dataset_revision,
        config.text_column,
        tokenizer_fingerprint(tokenizer),
    ]
    path = Path(str(config.dataset_name)).expanduser()
    if path.exists():
        every = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in every:
            if file.is_file():
                status = file.stat()
                relative = file.name if file == path else file.relative_to(path).as_posix()
                described.append([relative, status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:24]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A digest of everything that decides how text becomes ids, and of the EOS id between them.

    The same for a tokenizer, its saved copy, and one that a call has set to truncate or to pad.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = json.dumps(sorted(tokenizer.get_vocab().items()))
    else:
        parts = json.loads(backend.to_str())
        deciding = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        described = json.dumps([parts.get(name) for name in deciding], sort_keys=True)
    return hashlib.sha256(f"{described}|{tokenizer.eos_token_id}".encode()).hexdigest()[:24]


def prepare_streams(config: TrainConfig, output: Path, tokenizer: Any, token: str | None) -> None:
    """Tokenize the corpus into ``output``, which appears complete or not at all.

    Raises:
        DataError: the corpus cannot be read, has no such text column or no text in it, or is too
            small, or the tokenizer makes no tokens of it.
        UsageError: a configuration is asked for of a data set that has none.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(config, token)
    if "train" not in corpus:
        raise DataError(
            f"data set {config.dataset_name!r} has no train split; it has {list(corpus)}"
        )
    train, validation, policy = _split(config, corpus)
    log.info("validation split of %s: %s", config.dataset_name, policy)
    dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        counts = {}
        for split, rows in (("train", train), ("validation", validation)):
            documents = _documents(rows, config.text_column)
            counts[split] = _write_stream(
                scratch / f"{split}.bin", documents, len(rows), tokenizer, dtype, split
            )
        info = TokenInfo(
            train_tokens=counts["train"],
            validation_tokens=counts["validation"],
            vocab_size=len(tokenizer),
            dtype=np.dtype(dtype).name,
            eos_token_id=int(tokenizer.eos_token_id),
            tokenizer=str(config.teacher_name),
            dataset={
                "name": config.dataset_name,
                "config": config.dataset_config,
                "revision": config.dataset_revision,
                "text_column": config.text_column,
            },
            validation_split=policy,
            fingerprint=_content_fingerprint(scratch),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        )
        tokenizer.save_pretrained(str(scratch / TOKENIZER_DIR))
        (scratch / INFO_NAME).write_text(json.dumps(asdict(info), indent=2), encoding="utf-8")
        _publish(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _publish(scratch: Path, output: Path) -> None:
    """Rename into place; another process that was faster has written the same."""
    scratch.chmod(0o755)
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    try:
        os.rename(scratch, output)
    except OSError:
        if not (output / INFO_NAME).exists():
            raise


def _split(config: TrainConfig, corpus: Any) -> tuple[Any, Any, str]:
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
    texts = (text for batch in _documents(rows, column) for text in batch)
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


def _documents(rows: Any, column: str) -> Iterator[list[str]]:
    for start in range(0, len(rows), _DOCUMENTS_PER_CALL):
        batch = rows[start : start + _DOCUMENTS_PER_CALL][column]
        yield [text if isinstance(text, str) else "" for text in batch]


def _write_stream(
    path: Path,
    batches: Iterator[list[str]],
    rows: int,
    tokenizer: Any,
    dtype: type[np.unsignedinteger[Any]],
    split: str,
) -> int:
    """Append each document's ids and an EOS; returns the number of tokens.

    Raises:
        DataError: no document gives any token.
    """
    total = 0
    bar = tqdm(
        total=rows, desc=f"tokenizing {split}", unit="doc", disable=not on_terminal(), leave=False
    )
    with path.open("wb") as file, bar:
        for number, texts in enumerate(batches):
            for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
                if ids:
                    # Not tofile, whose error on a full disk does not say so
                    file.write(np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype).tobytes())
                    total += len(ids) + 1
            bar.update(len(texts))
            if not on_terminal() and number % 400 == 399:
                log.info("tokenizing %s: %d of %d documents", split, bar.n, rows)
        file.flush()
        os.fsync(file.fileno())
    if not total:
        raise DataError(
            f"the text of the {split} split gives no tokens with the tokenizer of"
            f" {tokenizer.name_or_path!r}; give a teacher whose tokenizer is whole"
        )
    return total


def _content_fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        with (directory / f"{split}.bin").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def open_streams(directory: Path) -> TokenStreams:
    """Map the streams of a prepared directory.

    Raises:
        DataError: it is not one, its files are not as long as its description says, or they hold
            ids that its tokenizer does not have.
    """
    try:
        described = json.loads((directory / INFO_NAME).read_text(encoding="utf-8"))
        if described.get("format") != _FORMAT:
            raise DataError(
                f"token streams at {directory} have format {described.get('format')!r}, not"
                f" {_FORMAT}; prepare them again"
            )
        info = TokenInfo(**described)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{directory} does not hold token streams ({INFO_NAME}: {error}); write them with"
            " python -m trainer.prepare_tokens"
        ) from error
    streams = {}
    for split, expected in (("train", info.train_tokens), ("validation", info.validation_tokens)):
        path = directory / f"{split}.bin"
        size = path.stat().st_size if path.exists() else -1
        if size != expected * np.dtype(info.dtype).itemsize:
            raise DataError(
                f"{path} is damaged: {size} bytes for {expected} tokens; delete {directory}"
            )
        streams[split] = np.memmap(path, dtype=info.dtype, mode="r")
        if (largest := _largest_seen(streams[split])) >= info.vocab_size:
            raise DataError(
                f"{path} is damaged: it has token {largest}, over a vocabulary of"
                f" {info.vocab_size}; delete {directory}"
            )
    return TokenStreams(directory, info, streams["train"], streams["validation"])


def _largest_seen(stream: np.ndarray) -> int:
    """The largest id of a stream ``[tokens]``, or of a sample of a large one.

    Preparation writes only ids of the tokenizer, so this is about files damaged since. Up to 64 Mi
    tokens are read whole, in well under a second. More are read in 1024 blocks from end to end:
    enough for a file that was overwritten, without minutes at every start for tens of gigabytes.
    """
    blocks = -(-len(stream) // _CHECKED_BLOCK)
    read = min(blocks, _CHECKED_TOKENS // _CHECKED_BLOCK)
    starts = np.linspace(0, blocks - 1, read, dtype=np.int64) * _CHECKED_BLOCK
    return max(int(stream[start : start + _CHECKED_BLOCK].max()) for start in starts)


def streams_for(config: TrainConfig, token: str | None = None) -> TokenStreams:
    """The streams of ``--tokens_dir``, or of the data set, tokenized now or kept from before.

    Raises:
        DataError: they cannot be made or read, or were made with another tokenizer than the
            teacher's.
        ModelError: the tokenizer that they are to be made with cannot be loaded.
        UsageError: a configuration is asked for of a data set that has none.
    """
    if config.tokens_dir:
        streams = open_streams(_local_tokens(config.tokens_dir, config.local_workdir))
        _check_tokenizer(streams.info, config, token)
        return streams
    tokenizer = load_tokenizer(config.teacher, token)
    directory = Path(config.cache_dir).expanduser() / "tokens" / cache_key(config, tokenizer)
    if (directory / INFO_NAME).exists():
        log.info("token streams reused from %s", directory)
    else:
        log.info("tokenizing %s into %s", config.dataset_name, directory)
        prepare_streams(config, directory, tokenizer, token)
    streams = open_streams(directory)
    log.info(
        "%s: %d training and %d validation tokens",
        config.dataset_name,
        streams.info.train_tokens,
        streams.info.validation_tokens,
    )
    return streams


def _check_tokenizer(info: TokenInfo, config: TrainConfig, token: str | None) -> None:
    """Compare the tokenizer of prepared streams with the teacher's, where both are known.

    Their ids mean something else to a teacher with another one, though they may well be in range.
    """
    if config.teacher_name is None:
        return
    if not info.tokenizer_fingerprint:
        log.warning(
            "%s does not tell the tokenizer it was made with, other than by its name %r; prepare it"
            " again to have it compared with the teacher's",
            config.tokens_dir,
            info.tokenizer,
        )
        return
    try:
        tokenizer = load_tokenizer(config.teacher, token)
    except ModelError as error:
        # A student that trains alone needs no tokenizer, and other teachers are told of later
        log.warning("%s is not compared with the teacher's tokenizer: %s", config.tokens_dir, error)
        return
    if tokenizer_fingerprint(tokenizer) != info.tokenizer_fingerprint:
        raise DataError(
            f"{config.tokens_dir} was made with the tokenizer of {info.tokenizer!r}, which is not"
            f" that of teacher {config.teacher!r}; prepare it again with the teacher's, or give"
            " the other teacher"
        )


def _local_tokens(uri: str, workdir: str) -> Path:
    """The directory itself, or a local copy of a ``gs://`` one; a whole copy is used again."""
    if not is_remote(uri):
        return Path(uri).expanduser()
    location = open_location(uri)
    described = location.read_bytes(INFO_NAME, limit=1 << 20)
    directory = (
        Path(workdir) / f"tokens-{hashlib.sha256(uri.encode() + described).hexdigest()[:16]}"
    )
    if not (directory / INFO_NAME).exists():
        for name in ("train.bin", "validation.bin", INFO_NAME):
            location.get(name, directory / name)
    return directory


# ── windows and batches ───────────────────────────────────────────────────────────────────────


def window_count(stream: np.ndarray, block_size: int) -> int:
    """Whole windows in a stream: each needs ``block_size`` inputs and one label more."""
    return max(0, (len(stream) - 1) // block_size)


class BatchSampler:
    """The windows of every update, as a pure function of (seed, epoch, step, rank).

    Update ``k`` takes the windows at places ``k · global_batch …`` of an endless sequence: the
    windows in a random order, then in another, and so on. How these are divided among processes
    and micro-batches does not change which they are.
    """

    def __init__(
        self,
        stream: np.ndarray,
        *,
        block_size: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream = stream
        self.block_size = block_size
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.windows = window_count(stream, block_size)
        if self.windows == 0:
            raise DataError(
                f"{len(stream)} training tokens do not fill one window of {block_size} + 1; give a"
                " larger data set or a smaller --block_size"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def window_indices(self, step: int, micro_step: int) -> np.ndarray:
        """Indices ``[micro_batch]`` of the windows of one micro-batch of this rank."""
        first = (
            step * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
        )
        return np.array(
            [self._window_at(place) for place in range(first, first + self.micro_batch)],
            dtype=np.int64,
        )

    def _window_at(self, place: int) -> int:
        epoch, index = divmod(place, self.windows)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            self._order = (epoch, order)
        return int(self._order[1][index])

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each ``[micro_batch, block_size]`` int64, on the CPU."""
        tokens = np.empty((self.micro_batch, self.block_size + 1), dtype=np.int64)
        for row, index in enumerate(self.window_indices(step, micro_step)):
            start = index * self.block_size
            tokens[row] = self.stream[start : start + self.block_size + 1]
        windows = torch.from_numpy(tokens)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def evaluation_batches(
    stream: np.ndarray,
    *,
    context: int,
    batch: int,
    max_tokens: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels ``[batch, context]`` over a split in order, every token predicted once.

    So that every context sees the same tokens, the last window is filled up instead of dropped;
    the labels of what fills it, and of windows that fill the last batch, are `IGNORED`. Processes
    take batches in turn, each as many as the others.
    """
    predicted = len(stream) - 1
    if max_tokens:
        predicted = min(predicted, max_tokens)
    windows = math.ceil(predicted / context)
    for turn in range(0, windows, batch * world_size):
        first = turn + rank * batch
        inputs = torch.zeros((batch, context), dtype=torch.int64)
        labels = torch.full((batch, context), IGNORED, dtype=torch.int64)
        for row, window in enumerate(range(first, min(first + batch, windows))):
            start = window * context
            length = min(context, predicted - start)
            piece = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
            inputs[row, :length], labels[row, :length] = piece[:-1], piece[1:]
        yield inputs, labels
