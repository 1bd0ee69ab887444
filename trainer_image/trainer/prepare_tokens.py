"""Tokenize a data set once into token streams that any context can be trained on.

    python -m trainer.prepare_tokens OUT_DIR --teacher_name=gpt2-xl --dataset_name=wikitext \
        --dataset_config=wikitext-103-raw-v1
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.streams import (
    INFO_NAME,
    TOKENIZER_DIR,
    TokenInfo,
    cache_key,
    open_streams,
    prepare_streams,
)
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.commands import run_command
from trainer.runtime.errors import DataError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.runtime.strict_json import dumps
from trainer.settings.config import SETTINGS, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.base import Location
from trainer.storage.places import check_output, is_remote, open_location

FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_name", "text_column", "cache_dir", "local_workdir")
    or name.startswith(("dataset_", "hf_"))
]

_STREAMS = ("train.bin", "validation.bin")

_SOURCE = "source"
"""Key of the description's ``dataset`` that holds the `cache_key` of what was tokenized."""

_INFO_LIMIT = 1 << 20
"""Bytes; a larger description is not one of ours."""


def run(config: TrainConfig, output: str) -> TokenInfo:
    """Write ``train.bin``, ``validation.bin``, the tokenizer and ``tokens.json`` to ``output``.

    Token streams of the same data set, tokenizer and source files that are there are left as they
    are.

    Args:
        config: ``teacher_name`` (whose tokenizer is used) and the ``dataset_…`` settings.
        output: a directory or ``gs://`` prefix, new or empty, or one that this has written.

    Raises:
        LiquidError: the data set or the tokenizer cannot be loaded, or the output holds something
            else or cannot be written.
    """
    config.require("teacher_name", "dataset_name")
    there = _found(output)
    if there is None:
        # Locally the streams are made beside the output and renamed
        check_output(output if is_remote(output) else str(Path(output).parent))
    token = find_hf_token(config)
    tokenizer = load_tokenizer(config.teacher, token)
    if there is not None:
        _check_same(there, config, tokenizer, output)
        log.info("%s already holds these token streams; they are left as they are", output)
        info = there
    elif is_remote(output):
        info = _upload(config, output, tokenizer, token)
    else:
        info = _prepare(config, Path(output), tokenizer, token)
    log.info(
        "%d training and %d validation tokens in %s",
        info.train_tokens,
        info.validation_tokens,
        output,
    )
    return info


# ── what is there already ─────────────────────────────────────────────────────────────────────
def _found(output: str) -> TokenInfo | None:
    """The description of the token streams at the output; None where there is nothing yet.

    Raises:
        DataError: something else is there.
    """
    location = open_location(output)
    if is_remote(output):
        return _found_remotely(location)
    directory = Path(output)
    if not directory.exists():
        return None
    if not directory.is_dir():
        raise DataError(f"{output} is a file; give a new directory for the token streams")
    if not any(directory.iterdir()):
        return None
    if not (directory / INFO_NAME).exists():
        raise _in_use(output)
    return open_streams(directory).info


def _found_remotely(location: Location) -> TokenInfo | None:
    sizes = {entry.name: entry.size for entry in location.list()}
    if INFO_NAME not in sizes:
        if set(sizes) - set(_STREAMS):
            raise _in_use(location.uri)
        return None  # what a killed attempt has left may be replaced
    try:
        described = json.loads(location.read_bytes(INFO_NAME, limit=_INFO_LIMIT))
        info = TokenInfo(**described)
        width = np.dtype(info.dtype).itemsize
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{location.child(INFO_NAME)} does not describe token streams ({error}); give a new"
            " prefix"
        ) from None
    for name, tokens in zip(_STREAMS, (info.train_tokens, info.validation_tokens), strict=True):
        if sizes.get(name) != tokens * width:
            raise DataError(
                f"{location.child(name)} is damaged: {sizes.get(name, 0)} bytes for {tokens}"
                f" tokens; delete {location.uri}"
            )
    return info


def _in_use(output: str) -> DataError:
    return DataError(f"{output} is not empty; give a new directory for the token streams")


def _check_same(there: TokenInfo, config: TrainConfig, tokenizer: Any, output: str) -> None:
    """Refuse to take other token streams for those that are asked for."""
    asked = {
        "name": config.dataset_name,
        "config": config.dataset_config,
        "revision": config.dataset_revision,
        "text_column": config.text_column,
    }
    described = there.dataset if isinstance(there.dataset, dict) else {}
    held = {"tokenizer": there.tokenizer, **described}
    differing = [
        f"{name} {held.get(name)!r}, not {value!r}"
        for name, value in {"tokenizer": config.teacher, **asked}.items()
        if held.get(name) != value
    ]
    if differing:
        raise DataError(
            f"{output} holds other token streams: {', '.join(differing)}; give a new directory"
        )
    if described.get(_SOURCE) != cache_key(config, tokenizer):
        raise DataError(
            f"{output} holds token streams of {config.dataset_name} that cannot be told to be the"
            " same: its files or the tokenizer may have changed since; give a new directory"
        )


# ── writing ───────────────────────────────────────────────────────────────────────────────────
def _prepare(config: TrainConfig, directory: Path, tokenizer: Any, token: str | None) -> TokenInfo:
    """Prepare beside the target, then rename, so that the directory is whole or absent."""
    # Before the corpus is read: a change while it is being read must not go unnoticed
    source = cache_key(config, tokenizer)
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        made = scratch / "tokens"
        prepare_streams(config, made, tokenizer, token)
        described = json.loads((made / INFO_NAME).read_text(encoding="utf-8"))
        described["dataset"][_SOURCE] = source
        (made / INFO_NAME).write_text(dumps(described, indent=2), encoding="utf-8")
        if directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        if directory.exists():
            raise _in_use(str(directory))
        made.rename(directory)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_streams(directory).info


def _upload(config: TrainConfig, output: str, tokenizer: Any, token: str | None) -> TokenInfo:
    """Prepare in scratch space, then upload; the description comes last: it vouches for all."""
    location = open_location(output)
    tokenizers = open_location(location.child(TOKENIZER_DIR))
    # What a killed attempt has left may be replaced; a whole one of another job may not
    if any(entry.name == INFO_NAME for entry in location.list()):
        raise _in_use(output)
    tokenizers.list()
    Path(config.local_workdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tokens-", dir=config.local_workdir) as scratch:
        directory = Path(scratch) / "tokens"
        info = _prepare(config, directory, tokenizer, token)
        for path in sorted((directory / TOKENIZER_DIR).iterdir()):
            tokenizers.put(path, path.name)
        for name in (*_STREAMS, INFO_NAME):
            location.put(directory / name, name)
    return info


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.prepare_tokens", str(__doc__), only=FLAGS)
    parser.add_argument(
        "output",
        metavar="OUT_DIR",
        help="a directory or gs:// prefix, new or with the same token streams",
    )
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    run(resolve(settings_from_args(args), {}).config, args.output)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
