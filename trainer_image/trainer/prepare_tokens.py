"""Tokenize a data set once into token streams that any context can be trained on.

    python -m trainer.prepare_tokens OUT_DIR --teacher_name=gpt2-xl --dataset_name=wikitext \
        --dataset_config=wikitext-103-raw-v1
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from pathlib import Path

from trainer.data.prepared import check_same, find_streams
from trainer.data.remote_data import pinned
from trainer.data.streams import INFO_NAME, TokenInfo, cache_key, write_streams
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.commands import run_command
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.settings.config import SETTINGS, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.places import check_output
from trainer.storage.publish import publishing

FLAGS = [
    name
    for name in SETTINGS
    if name in ("teacher_name", "teacher_revision", "text_column", "cache_dir", "local_workdir")
    or name.startswith(("dataset_", "hf_"))
]


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
    info = find_streams(output)
    if info is None:
        check_output(output)
    config, token = pinned(config), find_hf_token(config)
    tokenizer = load_tokenizer(config.pretrained, token)
    if info is not None:
        check_same(info, config, tokenizer, output)
        log.info("%s already holds these token streams; they are left as they are", output)
    else:
        # Before the corpus is read: a change while it is being read must not go unnoticed
        source = cache_key(config, tokenizer)
        workdir = Path(config.local_workdir)
        with publishing(output, last=INFO_NAME, workdir=workdir) as directory:
            info = write_streams(config, directory, tokenizer, token, source=source)
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
