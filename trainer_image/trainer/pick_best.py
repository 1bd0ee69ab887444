"""Pick the best checkpoint by a metric, reading sidecars only.

python -m trainer.pick_best gs://BUCKET/run --metric=val_loss_student@512
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoints.metadata import metric_of
from trainer.checkpoints.sidecar import Sidecar, digest_of_all, read_sidecars, without_sidecar
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError
from trainer.runtime.log import log, set_up_logging
from trainer.settings.flags import build_parser
from trainer.storage.places import open_location


@dataclass(frozen=True)
class Picked:
    """The checkpoint picked."""

    uri: str
    step: int
    value: float
    """Its metric; lower is better."""
    meta: dict[str, Any]
    digest: str
    """Of its file."""
    among: str
    """The digest of all checkpoints with sidecars, of which it is one."""


def run(sources: Sequence[str], metric: str) -> Picked:
    """The checkpoint of the lowest finite metric; ties go to the earlier step.

    A checkpoint counts only with metrics that were computed from its own weights, and with a file
    of the size its sidecar says.

    Args:
        sources: directories or ``gs://`` prefixes with checkpoints and sidecars.
        metric: a metric key, for example ``val_loss_student@512``.

    Raises:
        CheckpointError: nothing qualifies; the message lists what was found.
        StorageError: a source cannot be listed.
    """
    found: list[str] = []
    best: tuple[tuple[float, int, bool], str, Sidecar] | None = None
    every: list[Sidecar] = []
    for source in sources:
        location = open_location(source)
        sizes = {entry.name: entry.size for entry in location.list()}
        for name in without_sidecar(set(sizes)):
            log.warning("%s has no sidecar and is passed over", location.child(name))
        for sidecar in (there := read_sidecars(location)):
            value = metric_of(sidecar.meta, metric)
            problem = ""
            if sidecar.meta.get("metrics_step", sidecar.step) != sidecar.step:
                problem = "not evaluated at its step"
            elif not math.isfinite(value):
                problem = f"has {', '.join(sidecar.metrics) or 'no metrics'}"
            elif sizes.get(sidecar.name) != sidecar.size:
                problem = f"{sizes.get(sidecar.name)} bytes instead of {sidecar.size}"
                log.warning("%s is passed over: %s", location.child(sidecar.name), problem)
            if problem:
                found.append(f"{sidecar.name} (step {sidecar.step}: {problem})")
                continue
            # Of several names for one snapshot, the one that retention will not take away
            rank = (value, sidecar.step, not sidecar.name.startswith("best"))
            if best is None or rank < best[0]:
                best = (rank, location.child(sidecar.name), sidecar)
        every += there
    if best is None:
        listed = "; ".join(found) or "no checkpoint with a sidecar"
        raise CheckpointError(
            f"no checkpoint in {', '.join(sources)} has a finite {metric!r}; found: {listed}"
        )
    (value, step, _), uri, sidecar = best
    log.info("best by %s: %s, %.4f at step %d", metric, uri, value, step)
    return Picked(uri, step, value, sidecar.meta, sidecar.digest, digest_of_all(every))


def main(argv: list[str]) -> None:
    """The command line; prints the URI picked."""
    parser = build_parser("python -m trainer.pick_best", str(__doc__), only=())
    parser.add_argument(
        "sources", nargs="+", metavar="DIR_OR_URI", help="where checkpoints and sidecars lie"
    )
    parser.add_argument(
        "--metric", default="val_loss_student", help="lower is better [val_loss_student]"
    )
    args = parser.parse_args(argv)
    set_up_logging()
    print(run(args.sources, args.metric).uri)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
