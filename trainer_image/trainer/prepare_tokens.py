"""Tokenize a data set once into token streams that any context can be trained on.

    python -m trainer.prepare_tokens OUT_DIR --teacher_name=gpt2-xl --dataset_name=wikitext \
        --dataset_config=wikitext-103-raw-v1
"""

from __future__ import annotations

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
from trainer.teacher import load_tokenizer
from trainer.tokens import TokenInfo, open_streams, prepare_streams

FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_name", "text_column", "cache_dir") or name.startswith(("dataset_", "hf_"))
]


def run(config: TrainConfig, output: str) -> TokenInfo:
    """Write ``train.bin``, ``validation.bin``, the tokenizer and ``tokens.json`` to ``output``.

    A directory that already holds token streams of the same data set is left as it is.

    Args:
        config: ``teacher_name`` (whose tokenizer is used) and the ``dataset_…`` settings.
        output: a local directory, new or empty.

    Raises:
        LiquidError: the data set or the tokenizer cannot be loaded, or the directory is in use.
    """
    config.require("teacher_name", "dataset_name")
    directory = Path(output)
    if directory.is_dir() and any(directory.iterdir()):
        raise DataError(f"{output} is not empty; give a new directory for the token streams")
    token = find_hf_token(config)
    prepare_streams(config, directory, load_tokenizer(config.teacher, token), token)
    info = open_streams(directory).info
    log.info(
        "%d training and %d validation tokens in %s",
        info.train_tokens,
        info.validation_tokens,
        output,
    )
    return info


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.prepare_tokens", str(__doc__), only=FLAGS)
    parser.add_argument("output", metavar="OUT_DIR", help="a new or empty local directory")
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    run(resolve(settings_from_args(args), {}).config, args.output)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
