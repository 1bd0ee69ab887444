"""Write a student with learned positions as a stock Hugging Face GPT-2.

    python -m trainer.export_hf gs://BUCKET/run/best.pt OUT_DIR [--tokenizer=NAME_OR_DIR]

``AutoModelForCausalLM.from_pretrained(OUT_DIR)`` then loads it.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from pathlib import Path
from typing import Any

from trainer.checkpoints.snapshots import read_from
from trainer.models.gpt2.export import gpt2_model
from trainer.models.hugging_face import load_tokenizer
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError, ModelError, UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.settings.config import TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import resolve
from trainer.storage.places import check_output, is_empty
from trainer.storage.publish import publishing

FLAGS = ["n_heads", "trained_positions", "local_workdir"]


def run(
    checkpoint: str,
    output: str,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    trained_positions: int | None = None,
    workdir: str = "/tmp/liquid_work",  # noqa: S108 - the default of --local_workdir
) -> str:
    """Export a checkpoint with its tokenizer; the trained positions become the model's maximum.

    Args:
        checkpoint: path or ``gs://`` URI.
        output: a new or empty local directory or ``gs://`` prefix.
        tokenizer: name or directory; default is what the checkpoint was trained with.
        n_heads: where the metadata does not tell (default 12).
        trained_positions: where neither metadata nor optimizer state tells.
        workdir: scratch directory.

    Returns:
        ``output``.

    Raises:
        LiquidError: the checkpoint or the tokenizer cannot be read or do not fit together, or the
            output is in use or cannot be written.
    """
    if not is_empty(output):
        raise UsageError(f"{output} is in use; give a new directory to export to")
    check_output(output)
    source = read_from(checkpoint, Path(workdir))
    config = source.student_config(n_heads)
    name = tokenizer or source.meta.get("tokenizer")
    if not name:
        raise CheckpointError(f"{checkpoint} does not name its tokenizer; give --tokenizer")
    positions = source.trained_positions(trained_positions, required=True) or 0
    loaded = load_tokenizer(name, find_hf_token(TrainConfig()))
    if len(loaded) > config.vocab_size:
        raise ModelError(
            f"the tokenizer of {name!r} has {len(loaded)} tokens, {checkpoint} a vocabulary of"
            f" {config.vocab_size}; give --tokenizer with the one it was trained with"
        )
    model = gpt2_model(source.weights, config, positions)
    # Without the model's configuration nothing loads it
    with publishing(output, last="config.json", workdir=Path(workdir)) as directory:
        _write(model, loaded, directory)
    log.info("%s written to %s: %d positions", checkpoint, output, positions)
    return output


def _write(model: Any, tokenizer: Any, directory: Path) -> None:
    model.config.eos_token_id = model.config.bos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = tokenizer.eos_token_id
    tokenizer.model_max_length = model.config.n_positions
    model.save_pretrained(str(directory))
    tokenizer.save_pretrained(str(directory))


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.export_hf", str(__doc__), only=FLAGS)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="path or gs:// URI")
    parser.add_argument("output", metavar="OUT_DIR", help="a new or empty directory or gs:// URI")
    parser.add_argument("--tokenizer", help="name or directory [the checkpoint's]", default=None)
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    resolved = resolve(settings_from_args(args), {})
    run(
        args.checkpoint,
        args.output,
        tokenizer=args.tokenizer,
        n_heads=resolved.config.n_heads if resolved.given("n_heads") else None,
        trained_positions=resolved.config.trained_positions,
        workdir=resolved.config.local_workdir,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
