"""Tokenize a data set once into token streams that any context can be trained on.

    python -m trainer.prepare_tokens OUT_DIR --teacher_name=gpt2-xl --dataset_name=wikitext \
        --dataset_config=wikitext-103-raw-v1
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from trainer.config import (
    SETTINGS,
    TrainConfig,
    build_parser,
    resolve,
    run_command,
    settings_from_args,
)
from trainer.errors import DataError
from trainer.hf_token import find_hf_token
from trainer.log import log, quiet_libraries, set_up_logging
from trainer.storage import is_remote, open_location
from trainer.teacher import load_tokenizer
from trainer.tokens import INFO_NAME, TOKENIZER_DIR, TokenInfo, open_streams, prepare_streams

FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_name", "text_column", "cache_dir", "local_workdir")
    or name.startswith(("dataset_", "hf_"))
]


def run(config: TrainConfig, output: str) -> TokenInfo:
    """Write ``train.bin``, ``validation.bin``, the tokenizer and ``tokens.json`` to ``output``.

    A directory that already holds token streams of the same data set is left as it is.

    Args:
        config: ``teacher_name`` (whose tokenizer is used) and the ``dataset_…`` settings.
        output: a directory or ``gs://`` prefix, new or empty.

    Raises:
        LiquidError: the data set or the tokenizer cannot be loaded, or the directory is in use.
    """
    config.require("teacher_name", "dataset_name")
    info = _upload(config, output) if is_remote(output) else _prepare(config, Path(output))
    log.info(
        "%d training and %d validation tokens in %s",
        info.train_tokens,
        info.validation_tokens,
        output,
    )
    return info


def _prepare(config: TrainConfig, directory: Path) -> TokenInfo:
    if directory.is_dir() and any(directory.iterdir()):
        raise DataError(f"{directory} is not empty; give a new directory for the token streams")
    token = find_hf_token(config)
    prepare_streams(config, directory, load_tokenizer(config.teacher, token), token)
    return open_streams(directory).info


def _upload(config: TrainConfig, output: str) -> TokenInfo:
    """Prepare in scratch space, then upload; the description comes last: it vouches for all."""
    location, tokenizers = open_location(output), open_location(f"{output}/{TOKENIZER_DIR}")
    for place in (location, tokenizers):
        place.list()  # what a killed attempt has left may be replaced
    Path(config.local_workdir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tokens-", dir=config.local_workdir) as scratch:
        directory = Path(scratch) / "tokens"
        info = _prepare(config, directory)
        for path in sorted((directory / TOKENIZER_DIR).iterdir()):
            tokenizers.put(path, path.name)
        for name in ("train.bin", "validation.bin", INFO_NAME):
            location.put(directory / name, name)
    return info


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.prepare_tokens", str(__doc__), only=FLAGS)
    parser.add_argument(
        "output", metavar="OUT_DIR", help="a new or empty directory or gs:// prefix"
    )
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    run(resolve(settings_from_args(args), {}).config, args.output)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
