"""Corpus → token file → windows → batches.

A corpus is tokenized once into one flat stream per split: documents joined by the end-of-text
token, in uint16 where the vocabulary fits, else uint32. A window is ``block_size + 1`` consecutive
tokens, one starting every ``block_size`` tokens, so the stream does not depend on the context.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trainer.data.corpus import documents, load_corpus, split_corpus
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.errors import DataError, ModelError
from trainer.runtime.log import log, on_terminal
from trainer.settings.config import TrainConfig
from trainer.storage.places import is_remote, open_location

INFO_NAME = "tokens.json"

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
    train, validation, policy = split_corpus(config, corpus)
    log.info("validation split of %s: %s", config.dataset_name, policy)
    dtype = np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        counts = {}
        for split, rows in (("train", train), ("validation", validation)):
            texts = documents(rows, config.text_column)
            counts[split] = _write_stream(
                scratch / f"{split}.bin", texts, len(rows), tokenizer, dtype, split
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
