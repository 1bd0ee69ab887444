"""Write a student as a stock Hugging Face model: GPT-2, or GPT-NeoX where its positions are rotary.

    python -m trainer.export_hf gs://BUCKET/run/best.pt OUT_DIR [--tokenizer=NAME_OR_DIR]

``AutoModelForCausalLM.from_pretrained(OUT_DIR)`` then loads it. A model card tells what the
checkpoint's metadata tells.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import tokenizer_of
from trainer.checkpoints.model_card import model_card
from trainer.checkpoints.snapshots import read_from
from trainer.models.hugging_face import load_tokenizer
from trainer.models.pretrained import Pretrained
from trainer.models.stock import stock_model
from trainer.models.student import StudentConfig
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError, ModelError, UsageError
from trainer.runtime.log import log, quiet_libraries, set_up_logging
from trainer.settings.config import DEFAULT_WORKDIR, SETTINGS, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.hf_token import find_hf_token
from trainer.settings.layers import Resolved, resolve
from trainer.storage.copies import DEFAULT_CACHE
from trainer.storage.places import check_output, is_empty, is_remote
from trainer.storage.publish import publishing

OF_CHECKPOINT = ["n_heads", "trained_positions", "block_size"]
"""What a checkpoint without metadata does not tell."""
FLAGS = [
    *OF_CHECKPOINT,
    "local_workdir",
    "cache_dir",
    *(name for name in SETTINGS if name.startswith("hf_")),
]


@dataclass(frozen=True)
class StockStudent:
    """A student as `transformers` has it, in memory."""

    model: Any
    tokenizer: Any
    positions: int
    """The longest context in tokens."""
    source: Checkpoint
    config: StudentConfig


def read_student(
    checkpoint: str,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    trained_positions: int | None = None,
    block_size: int | None = None,
    token: str | None = None,
    workdir: str = DEFAULT_WORKDIR,
    cache_dir: str = DEFAULT_CACHE,
) -> StockStudent:
    """A checkpoint's student in its stock form, with its tokenizer.

    Args:
        checkpoint: path or ``gs://`` URI.
        tokenizer: hub name, local or ``gs://`` directory; default is what the checkpoint was
            trained with.
        n_heads: where the metadata does not tell (default 12).
        trained_positions: where neither metadata nor optimizer state tells.
        block_size: longest context of a rotary student, where the metadata does not tell.
        token: for the Hugging Face hub.
        workdir: scratch directory.
        cache_dir: where the files of a tokenizer in a ``gs://`` directory are kept.

    Raises:
        LiquidError: the checkpoint or the tokenizer cannot be read or do not fit together.
    """
    source = read_from(checkpoint, Path(workdir))
    config = source.student_config(n_heads)
    of_tokenizer = (
        Pretrained(tokenizer, cache_dir=cache_dir)
        if tokenizer
        else tokenizer_of(source.meta, cache_dir)
    )
    if of_tokenizer is None:
        raise CheckpointError(f"{checkpoint} does not name its tokenizer; give --tokenizer")
    positions = _longest(source, trained_positions, block_size)
    loaded = load_tokenizer(of_tokenizer, token)
    if len(loaded) > config.vocab_size:
        raise ModelError(
            f"the tokenizer of {of_tokenizer.name!r} has {len(loaded)} tokens, {checkpoint} a"
            f" vocabulary of {config.vocab_size}; give --tokenizer with the one it was trained with"
        )
    model = stock_model(source.weights, config, positions)
    for described in (model.config, model.generation_config):
        described.eos_token_id = described.bos_token_id = loaded.eos_token_id
    # Windows are full in training, so that nothing is known of padding; generating wants a name
    model.generation_config.pad_token_id = loaded.eos_token_id
    loaded.model_max_length = positions
    return StockStudent(model, loaded, positions, source, config)


def _longest(source: Checkpoint, trained_positions: int | None, block_size: int | None) -> int:
    """The longest context in tokens: the trained rows, or what a rotary student was trained at."""
    positions = source.trained_positions(trained_positions, required=True)
    if positions is not None:
        if block_size is not None:
            raise UsageError(
                f"--block_size={block_size} is for rotary students; {source.source} has a table of"
                " positions, so leave it out or give --trained_positions"
            )
        return positions
    positions = block_size or source.context
    if positions is None:
        raise CheckpointError(
            f"{source.source} does not tell the context it was trained at; give --block_size"
        )
    return positions


def run(
    checkpoint: str,
    output: str,
    *,
    tokenizer: str | None = None,
    n_heads: int | None = None,
    trained_positions: int | None = None,
    block_size: int | None = None,
    license: str | None = None,
    hub: TrainConfig | None = None,
    again: bool = False,
    workdir: str = DEFAULT_WORKDIR,
    cache_dir: str = DEFAULT_CACHE,
) -> StockStudent:
    """Export a checkpoint with its tokenizer; its context becomes the model's maximum.

    Args:
        checkpoint: path or ``gs://`` URI.
        output: a new or empty local directory or ``gs://`` prefix.
        tokenizer: see `read_student`, as for the next three.
        n_heads: attention heads.
        trained_positions: rows of the position table.
        block_size: context of a rotary student.
        license: its identifier on the hub, for the model card; None is unknown.
        hub: says where the Hugging Face token is; else the environment alone does.
        again: a stage that the platform starts again: objects that its start before has left at a
            ``gs://`` output may be replaced.
        workdir: scratch directory.
        cache_dir: where the files of a tokenizer in a ``gs://`` directory are kept.

    Returns:
        The student that was exported.

    Raises:
        LiquidError: the checkpoint or the tokenizer cannot be read or do not fit together, or the
            output is in use or cannot be written.
    """
    if not (again and is_remote(output)) and not is_empty(output):
        raise UsageError(f"{output} is in use; give a new directory to export to")
    check_output(output)
    student = read_student(
        checkpoint,
        tokenizer=tokenizer,
        n_heads=n_heads,
        trained_positions=trained_positions,
        block_size=block_size,
        token=find_hf_token(hub or TrainConfig()),
        workdir=workdir,
        cache_dir=cache_dir,
    )
    # Without the model's configuration nothing loads it
    with publishing(output, last="config.json", workdir=Path(workdir)) as directory:
        student.model.save_pretrained(str(directory))
        student.tokenizer.save_pretrained(str(directory))
        (directory / "README.md").write_text(_card(student, license), encoding="utf-8")
    log.info("%s written to %s: %d positions", checkpoint, output, student.positions)
    return student


def _card(student: StockStudent, license: str | None) -> str:
    return model_card(
        student.source,
        student.config,
        architecture=type(student.model).__name__,
        positions=student.positions,
        parameters=sum(tensor.numel() for tensor in student.source.weights.values()),
        license=license,
    )


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.export_hf", str(__doc__), only=FLAGS)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="path or gs:// URI")
    parser.add_argument("output", metavar="OUT_DIR", help="a new or empty directory or gs:// URI")
    parser.add_argument(
        "--tokenizer", help="hub name, local or gs:// directory [of the checkpoint]", default=None
    )
    parser.add_argument(
        "--license", help="identifier for the model card, e.g. apache-2.0 [unknown]", default=None
    )
    args = parser.parse_args(argv)
    set_up_logging()
    quiet_libraries()
    resolved = resolve(settings_from_args(args), {})
    run(
        args.checkpoint,
        args.output,
        tokenizer=args.tokenizer,
        license=args.license,
        hub=resolved.config,
        workdir=resolved.config.local_workdir,
        cache_dir=resolved.config.cache_dir,
        **of_checkpoint(resolved),
    )


def of_checkpoint(resolved: Resolved) -> dict[str, Any]:
    """Those of `OF_CHECKPOINT` that the command line gives, None for the others."""
    return {
        name: getattr(resolved.config, name) if resolved.given(name) else None
        for name in OF_CHECKPOINT
    }


if __name__ == "__main__":
    raise SystemExit(run_command(main))
