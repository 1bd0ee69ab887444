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
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from trainer.config import TrainConfig
from trainer.errors import DataError
from trainer.log import log, on_terminal
from trainer.storage import is_remote, open_location
from trainer.teacher import load_tokenizer

INFO_NAME = "tokens.json"
TOKENIZER_DIR = "tokenizer"
VALIDATION_FRACTION = 0.01
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
_DOCUMENTS_PER_CALL = 256


@dataclass(frozen=True)
class TokenInfo:
    """What a directory of token streams holds (its ``tokens.json``)."""

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
    format: int = _FORMAT


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
    """
    import datasets
    import huggingface_hub.errors

    name = str(config.dataset_name)
    path = Path(name).expanduser()
    datasets.disable_progress_bars()
    try:
        if path.exists():
            loaded = _load_local(path, config)
        else:
            loaded = datasets.load_dataset(
                name, config.dataset_config, revision=config.dataset_revision, token=token
            )
    except (
        OSError,
        ValueError,
        RuntimeError,
        datasets.exceptions.DatasetsError,
        datasets.exceptions.DatasetGenerationError,
        huggingface_hub.errors.HfHubHTTPError,
    ) as error:
        cause = error.__cause__ or error
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise DataError(
            f"data set {name!r} cannot be loaded: {first or type(cause).__name__}"
        ) from error
    if isinstance(loaded, datasets.Dataset):
        loaded = datasets.DatasetDict({"train": loaded})
    return loaded


def _load_local(path: Path, config: TrainConfig) -> Any:
    import datasets

    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return datasets.load_from_disk(str(path))
    kinds = {_BUILDERS[file.suffix.lower()] for file in corpus_files(path)}
    if len(kinds) > 1:
        raise DataError(f"data set {str(path)!r} mixes {' and '.join(sorted(kinds))} files")
    options: dict[str, Any] = {"cache_dir": str(Path(config.cache_dir).expanduser() / "datasets")}
    if kinds == {"text"}:
        options["sample_by"] = "document"
    if path.is_file():
        return datasets.load_dataset(*kinds, data_files=str(path), **options)
    return datasets.load_dataset(str(path), config.dataset_config, **options)


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
    """A digest of everything that decides how text becomes ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{described}|{tokenizer.eos_token_id}".encode()).hexdigest()[:24]


def prepare_streams(config: TrainConfig, output: Path, tokenizer: Any, token: str | None) -> None:
    """Tokenize the corpus into ``output``, which appears complete or not at all.

    Raises:
        DataError: the corpus cannot be read, has no such text column, or is too small.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    corpus = load_corpus(config, token)
    if "train" not in corpus:
        raise DataError(
            f"data set {config.dataset_name!r} has no train split; it has {list(corpus)}"
        )
    train, validation, policy = _split(corpus)
    _check_column(config, train)
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


def _split(corpus: Any) -> tuple[Any, Any, str]:
    """Train rows, validation rows and a sentence on where the latter come from."""
    train = corpus["train"]
    for name in ("validation", "test"):
        if name in corpus and len(corpus[name]):
            return train, corpus[name], f"the data set's {name} split"
    held_out = max(1, math.ceil(len(train) * VALIDATION_FRACTION))
    if len(train) < 2:
        raise DataError("the train split has one document only; add a validation split")
    order = np.random.default_rng(0).permutation(len(train))
    policy = (
        f"{held_out} documents (1 %) drawn from train, which has no validation or test beside it"
    )
    return train.select(np.sort(order[held_out:])), train.select(np.sort(order[:held_out])), policy


def _check_column(config: TrainConfig, rows: Any) -> None:
    if config.text_column not in rows.column_names:
        raise DataError(
            f"data set {config.dataset_name!r} has no column {config.text_column!r}; it has"
            f" {', '.join(rows.column_names)}; give --text_column"
        )


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
    """Append each non-empty document's ids and an EOS; returns the number of tokens."""
    total = 0
    bar = tqdm(
        total=rows, desc=f"tokenizing {split}", unit="doc", disable=not on_terminal(), leave=False
    )
    with path.open("wb") as file, bar:
        for number, batch in enumerate(batches):
            texts = [text for text in batch if text.strip()]
            encoded = (
                tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
                if texts
                else []
            )
            for ids in encoded:
                np.asarray([*ids, tokenizer.eos_token_id], dtype=dtype).tofile(file)
                total += len(ids) + 1
            bar.update(len(batch))
            if not on_terminal() and number % 400 == 399:
                log.info("tokenizing %s: %d of %d documents", split, bar.n, rows)
        file.flush()
        os.fsync(file.fileno())
    if total < 2:
        raise DataError(f"the {split} split holds no text")
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
        DataError: it is not one, or its files are not as long as its description says.
    """
    try:
        described = json.loads((directory / INFO_NAME).read_text(encoding="utf-8"))
        if described.get("format") != _FORMAT:
            raise DataError(
                f"token streams at {directory} have format {described.get('format')!r}, not"
                f" {_FORMAT}; prepare them again"
            )
        info = TokenInfo(**described)
    except (OSError, ValueError, TypeError, AttributeError) as error:
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
    return TokenStreams(directory, info, streams["train"], streams["validation"])


def streams_for(config: TrainConfig, token: str | None = None) -> TokenStreams:
    """The streams of ``--tokens_dir``, or of the data set, tokenized now or kept from before."""
    if config.tokens_dir:
        return open_streams(_local_tokens(config.tokens_dir, config.local_workdir))
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
