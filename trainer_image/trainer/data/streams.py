"""Corpus → token file → windows → batches.

A corpus is tokenized once into one flat stream per split: documents joined by the end-of-text
token, in uint16 where the vocabulary fits, else uint32. A window is ``block_size + 1`` consecutive
tokens, one starting every ``block_size`` tokens, so the stream does not depend on the context.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.corpus import documents, load_corpus, split_corpus
from trainer.data.remote_data import pinned
from trainer.data.tokenizing import Encoder
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.errors import DataError, ModelError, StorageError
from trainer.runtime.log import ProgressBar, log, on_terminal
from trainer.runtime.strict_json import dumps
from trainer.settings.config import TrainConfig
from trainer.storage.files import in_home, open_regular, os_errors, read_regular
from trainer.storage.places import fetch_directory
from trainer.storage.publish import publishing

INFO_NAME = "tokens.json"
INFO_LIMIT = 1 << 20
"""Bytes; a larger description is not one of ours."""
STREAMS = ("train.bin", "validation.bin")
SOURCE = "source"
"""Key of the description's ``dataset`` that holds the `cache_key` of what was tokenized."""

TOKENIZER_DIR = "tokenizer"

_FORMAT = 1

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
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id is {self.eos_token_id}, over vocab_size")
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


def cache_key(config: TrainConfig, tokenizer: Any) -> str:
    """A digest of data set, configuration, revision, text column and tokenizer.

    Local files count by relative name, size and modification time; those of a ``gs://`` directory
    by their checksums, which its revision is a digest of: see `trainer.data.remote_data.pinned`.
    """
    described: list[Any] = [
        _FORMAT,
        config.dataset_name,
        config.dataset_config,
        config.dataset_revision,
        config.text_column,
        tokenizer_fingerprint(tokenizer),
    ]
    path = Path(in_home(str(config.dataset_name)))
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


def write_streams(
    config: TrainConfig,
    directory: Path,
    tokenizer: Any,
    token: str | None,
    *,
    source: str | None = None,
) -> TokenInfo:
    """Tokenize the corpus into a directory.

    Args:
        config: the data set.
        directory: an existing one.
        tokenizer: of the teacher.
        token: of Hugging Face.
        source: the `cache_key` of the data set, to be told apart by later.

    Raises:
        DataError: the corpus cannot be read, has no such text column or no text in it, or is too
            small, or the tokenizer makes no tokens of it.
        UsageError: a configuration is asked for of a data set that has none.
    """
    corpus = load_corpus(config, token)
    if "train" not in corpus:
        raise DataError(
            f"data set {config.dataset_name!r} has no train split; it has {list(corpus)}"
        )
    train, validation, policy = split_corpus(config, corpus)
    log.info("validation split of %s: %s", config.dataset_name, policy)
    dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    counts = {}
    with Encoder(tokenizer) as encoder:
        for split, rows in (("train", train), ("validation", validation)):
            texts = documents(rows, config.text_column)
            path = directory / f"{split}.bin"
            counts[split] = _write_stream(path, texts, len(rows), encoder, tokenizer, dtype, split)
    dataset = {
        "name": config.dataset_name,
        "config": config.dataset_config,
        "revision": config.dataset_revision,
        "text_column": config.text_column,
    }
    info = TokenInfo(
        train_tokens=counts["train"],
        validation_tokens=counts["validation"],
        vocab_size=len(tokenizer),
        dtype=np.dtype(dtype).name,
        eos_token_id=int(tokenizer.eos_token_id),
        tokenizer=str(config.teacher_name),
        dataset=dataset if source is None else {**dataset, SOURCE: source},
        validation_split=policy,
        fingerprint=_content_fingerprint(directory),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
    )
    tokenizer.save_pretrained(str(directory / TOKENIZER_DIR))
    (directory / INFO_NAME).write_text(dumps(asdict(info), indent=2), encoding="utf-8")
    return info


def _write_stream(
    path: Path,
    batches: Iterator[list[str]],
    rows: int,
    encoder: Encoder,
    tokenizer: Any,
    dtype: type[np.unsignedinteger[Any]],
    split: str,
) -> int:
    """Append each document's ids and an EOS; returns the number of tokens.

    Raises:
        DataError: no document gives any token, or one cannot be tokenized.
    """
    total, of_document, read = 0, 0, 0
    end = np.asarray([tokenizer.eos_token_id], dtype=dtype).tobytes()
    bar = ProgressBar(f"tokenizing {split}", "doc", rows)
    with path.open("wb") as file, contextlib.closing(bar):
        for number, texts in enumerate(batches):
            for ids, last in encoder.pieces(texts):
                _check_ids(ids, tokenizer)
                # Not tofile, whose error on a full disk does not say so
                file.write(ids.astype(dtype).tobytes())
                of_document += len(ids)
                if last and of_document:
                    file.write(end)
                    total += of_document + 1
                    of_document = 0
            bar.update(len(texts))
            read += len(texts)
            if not on_terminal() and number % 400 == 399:
                log.info("tokenizing %s: %d of %d documents", split, read, rows)
        file.flush()
        os.fsync(file.fileno())
    if not total:
        raise DataError(
            f"the text of the {split} split gives no tokens with the tokenizer of"
            f" {tokenizer.name_or_path!r}; give a teacher whose tokenizer is whole"
        )
    return total


def _check_ids(ids: np.ndarray, tokenizer: Any) -> None:
    if len(ids) and (largest := int(ids.max())) >= len(tokenizer):
        raise DataError(
            f"the tokenizer of {tokenizer.name_or_path!r} makes id {largest}, over its vocabulary"
            f" of {len(tokenizer)}; give a teacher whose tokenizer is whole"
        )


def _content_fingerprint(directory: Path) -> str:
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        with (directory / f"{split}.bin").open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:24]


def read_info(described: bytes, directory: str) -> TokenInfo:
    """The description of token streams, from its JSON.

    Raises:
        DataError: it is none, or one of another format.
    """
    try:
        content = json.loads(described)
        if content.get("format") != _FORMAT:
            raise DataError(
                f"token streams at {directory} have format {content.get('format')!r:.80}, not"
                f" {_FORMAT}; prepare them again"
            )
        return TokenInfo(**content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise no_streams(directory, error) from error


def no_streams(directory: str, reason: object) -> DataError:
    """The error for a directory that holds something else."""
    return DataError(
        f"{directory} does not hold token streams ({INFO_NAME}: {str(reason)[:300]}); write them"
        " with python -m trainer.prepare_tokens"
    )


def check_sizes(info: TokenInfo, sizes: Mapping[str, int], directory: str) -> None:
    """Compare the bytes of the streams with their description.

    Raises:
        DataError: a stream is missing, or longer or shorter.
    """
    for name, tokens in zip(STREAMS, (info.train_tokens, info.validation_tokens), strict=True):
        size = sizes.get(name, -1)
        if size != tokens * np.dtype(info.dtype).itemsize:
            raise DataError(
                f"{directory}/{name} is damaged: {size} bytes for {tokens} tokens; delete"
                f" {directory}"
            )


def open_streams(directory: Path) -> TokenStreams:
    """Map the streams of a prepared directory.

    Raises:
        DataError: it is not one, its files are not as long as its description says, or they hold
            ids that its tokenizer does not have.
    """
    try:
        described = read_regular(directory / INFO_NAME, limit=INFO_LIMIT)
    except PermissionError as error:
        with os_errors("reading", directory / INFO_NAME):
            raise error
    except (OSError, StorageError) as error:
        raise no_streams(str(directory), error) from error
    info = read_info(described, str(directory))
    paths = [directory / name for name in STREAMS]
    sizes = {path.name: path.stat().st_size for path in paths if path.is_file()}
    check_sizes(info, sizes, str(directory))
    streams = []
    for path in paths:
        with os_errors("reading", path), open_regular(path) as file:
            try:
                streams.append(np.memmap(file, dtype=info.dtype, mode="r"))
            except (ValueError, OverflowError) as error:
                raise DataError(f"{path} cannot be read: {error}") from error
        if (largest := _largest_seen(streams[-1])) >= info.vocab_size:
            raise DataError(
                f"{path} is damaged: it has token {largest}, over a vocabulary of"
                f" {info.vocab_size}; delete {directory}"
            )
    return TokenStreams(directory, info, *streams)


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
        workdir = Path(config.local_workdir)
        names = (*STREAMS, INFO_NAME)
        streams = open_streams(fetch_directory(config.tokens_dir, names, workdir, limit=INFO_LIMIT))
        _check_tokenizer(streams.info, config, token)
        return streams
    config = pinned(config)
    tokenizer = load_tokenizer(config.pretrained, token)
    directory = Path(in_home(config.cache_dir)) / "tokens" / cache_key(config, tokenizer)
    if (directory / INFO_NAME).exists():
        log.info("token streams reused from %s", directory)
    else:
        log.info("tokenizing %s into %s", config.dataset_name, directory)
        _fill_cache(config, directory, tokenizer, token)
    streams = open_streams(directory)
    log.info(
        "%s: %d training and %d validation tokens",
        config.dataset_name,
        streams.info.train_tokens,
        streams.info.validation_tokens,
    )
    return streams


def _fill_cache(config: TrainConfig, directory: Path, tokenizer: Any, token: str | None) -> None:
    workdir = Path(config.local_workdir)
    try:
        with publishing(str(directory), last=INFO_NAME, workdir=workdir) as made:
            write_streams(config, made, tokenizer, token)
    except StorageError:
        # Another process that was faster has written the same
        if not (directory / INFO_NAME).exists():
            raise


def _check_tokenizer(info: TokenInfo, config: TrainConfig, token: str | None) -> None:
    """Compare the tokenizer of prepared streams with the teacher's, where both are known.

    Their ids mean something else to a teacher with another one, though they may well be in range.
    """
    if config.teacher_name is None or config.teacher_targets:
        return  # targets tell the tokenizer of their tokens, and the teacher may be out of reach
    if not info.tokenizer_fingerprint:
        log.warning(
            "%s does not tell the tokenizer it was made with, other than by its name %r; prepare it"
            " again to have it compared with the teacher's",
            config.tokens_dir,
            info.tokenizer,
        )
        return
    try:
        tokenizer = load_tokenizer(config.pretrained, token)
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
