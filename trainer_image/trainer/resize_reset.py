"""Make a checkpoint ready for a longer context: positions stretched, everything else reset.

python -m trainer.resize_reset gs://BUCKET/run/best.pt OUT.pt --block_size=1024
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from trainer.checkpoint import Snapshot, reset_meta, sidecar_name
from trainer.config import build_parser, resolve, run_command, settings_from_args
from trainer.errors import CheckpointError
from trainer.log import log, set_up_logging
from trainer.snapshots import read_from
from trainer.start import stretched_student
from trainer.storage import is_remote, open_location

FLAGS = ["block_size", "pos_resize", "trained_positions", "n_heads", "local_workdir"]


def run(
    checkpoint: str,
    output: str,
    block_size: int,
    *,
    method: str = "linear",
    trained_positions: int | None = None,
    n_heads: int | None = None,
    workdir: str = "/tmp/liquid_work",  # noqa: S108 - the default of --local_workdir
) -> dict[str, Any]:
    """Write weights for ``block_size`` positions, without optimizer, at step 0.

    Args:
        checkpoint: a checkpoint's path or ``gs://`` URI.
        output: path or ``gs://`` URI of the file to write; its sidecar goes beside it.
        block_size: the new context in tokens.
        method: ``linear`` or ``copy``, see `trainer.positions.resize_positions`.
        trained_positions: where neither metadata nor optimizer state tells.
        n_heads: where the metadata does not tell.
        workdir: scratch directory.

    Returns:
        The metadata written; ``origin`` in it says where the weights came from.

    Raises:
        CheckpointError: the checkpoint cannot be read, or its trained positions are not known.
    """
    source = read_from(checkpoint, Path(workdir))
    model = source.meta.get("model") or {}
    config = source.student_config(
        n_heads=n_heads or model.get("n_heads") or 12,
        rope_scale=float(source.meta.get("rope_scale") or 1.0),
        dropout=float(model.get("dropout") or 0.0),
    )
    trained = trained_positions or source.trained_positions()
    if trained is None and "pos.weight" in source.weights:
        raise CheckpointError(
            f"{checkpoint} does not tell how many of its {config.positions} position rows were"
            " trained; give --trained_positions"
        )
    weights, config = stretched_student(source.weights, config, trained, block_size, method)
    old_context = source.meta.get("block_size") or trained
    origin = {
        "checkpoint": checkpoint,
        "step": source.step,
        "block_size": old_context,
        "metrics": source.meta.get("metrics") or {},
        "pos_resize": method,
    }
    meta = reset_meta(
        source.meta,
        config,
        block_size=block_size,
        trained_positions=max(block_size, trained or 0),
        origin=origin,
    )
    _write(Snapshot(weights, None, {}, 0, {}, meta), output, workdir)
    log.info("%s at context %s -> %s at context %d", checkpoint, old_context, output, block_size)
    return meta


def _write(snapshot: Snapshot, output: str, workdir: str) -> None:
    parent, _, name = output.rpartition("/")
    if not is_remote(output):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        snapshot.write(Path(output))
        return
    scratch = Path(tempfile.mkdtemp(prefix="resize-", dir=workdir))
    try:
        path = scratch / name
        snapshot.write(path)
        location = open_location(parent)
        location.list()  # what is there now may be replaced
        location.put(path, name)
        location.put(path.with_name(sidecar_name(name)), sidecar_name(name))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
