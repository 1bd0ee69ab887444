"""Make a checkpoint ready for a longer context: positions stretched, everything else reset.

python -m trainer.resize_reset gs://BUCKET/run/best.pt OUT.pt --block_size=1024
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import origin_of, reset_meta
from trainer.checkpoints.names import sidecar_name
from trainer.checkpoints.snapshots import read_from
from trainer.runtime.commands import run_command
from trainer.runtime.devices import free_memory
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log, set_up_logging
from trainer.settings.config import DEFAULT_WORKDIR
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import resolve
from trainer.storage.places import (
    check_output_file,
    split_uri,
)
from trainer.storage.publish import publishing
from trainer.training.start import stretched_student

FLAGS = ["block_size", "pos_resize", "trained_positions", "n_heads", "local_workdir"]

_BYTES_PER_ELEMENT = 16
"""Of a table while it is stretched: in fp64, in fp32, and in order."""


def run(
    checkpoint: str,
    output: str,
    block_size: int,
    *,
    method: str = "linear",
    trained_positions: int | None = None,
    n_heads: int | None = None,
    workdir: str = DEFAULT_WORKDIR,
) -> dict[str, Any]:
    """Write weights for ``block_size`` positions, without optimizer, at step 0.

    Args:
        checkpoint: a checkpoint's path or ``gs://`` URI.
        output: path or ``gs://`` URI of the file to write; its sidecar goes beside it.
        block_size: the new context in tokens.
        method: ``linear`` or ``copy``, see `trainer.models.positions.resize_positions`.
        trained_positions: where neither metadata nor optimizer state tells.
        n_heads: where the metadata does not tell.
        workdir: scratch directory.

    Returns:
        The metadata written; ``origin`` in it says where the weights came from.

    Raises:
        UsageError: the checkpoint has other heads or fewer positions than given, or a table for
            ``block_size`` does not fit into memory.
        CheckpointError: the checkpoint cannot be read, or its trained positions are not known.
        StorageError: the output cannot be written.
    """
    check_output_file(output)
    source = read_from(checkpoint, Path(workdir))
    config = source.student_config(n_heads)
    trained = source.trained_positions(trained_positions, required=True)
    if trained is not None and block_size > trained:
        _check_memory(source.weights["pos.weight"], block_size)
    weights, config = stretched_student(source.weights, config, trained, block_size, method)
    old_context = source.context or trained
    origin = origin_of(source, old_context, pos_resize=method)
    meta = reset_meta(
        source.meta,
        config,
        block_size=block_size,
        trained_positions=max(block_size, trained or 0),
        origin=origin,
    )
    directory, name = split_uri(output)
    last = sidecar_name(name)
    with publishing(directory, last=last, workdir=Path(workdir), replacing=True) as made:
        Snapshot(weights, None, {}, 0, {}, meta).write(made / name)
    log.info("%s at context %s -> %s at context %d", checkpoint, old_context, output, block_size)
    return meta


def _check_memory(table: Tensor, rows: int) -> None:
    """Refuse a table that the system would end the process for."""
    need, free = rows * table.shape[1] * _BYTES_PER_ELEMENT, free_memory()
    if free is not None and need > free:
        raise UsageError(
            f"--block_size={rows}: stretching {table.shape[0]} positions to as many takes"
            f" {need / 2**30:.1f} GiB of memory, of which {free / 2**30:.1f} GiB are free; give a"
            " smaller one"
        )


def main(argv: list[str]) -> None:
    """The command line."""
    parser = build_parser("python -m trainer.resize_reset", str(__doc__), only=FLAGS)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="path or gs:// URI")
    parser.add_argument("output", metavar="OUT", help="path or gs:// URI of the file to write")
    args = parser.parse_args(argv)
    set_up_logging()
    resolved = resolve(settings_from_args(args), {})
    config = resolved.config.require("block_size")
    run(
        args.checkpoint,
        args.output,
        config.context,
        method=config.pos_resize,
        trained_positions=config.trained_positions,
        n_heads=config.n_heads if resolved.given("n_heads") else None,
        workdir=config.local_workdir,
    )


if __name__ == "__main__":
    raise SystemExit(run_command(main))
