"""Training a trial at a place of its own, up to its end or to that of a rung."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoints.names import COMPILE_CACHE
from trainer.data.streams import INFO_LIMIT, INFO_NAME, read_info
from trainer.metrics.reading import read_run
from trainer.runtime.compiled_code import LIMIT
from trainer.runtime.devices import count_gpus
from trainer.runtime.errors import MetricsError, StorageError, TrainingError
from trainer.runtime.log import log
from trainer.search.trials import Outcome, Trial, location_name
from trainer.settings.accumulation import with_accumulation
from trainer.settings.layers import resolve
from trainer.settings.values import given
from trainer.storage.base import StorageMissingError
from trainer.storage.places import open_location, read_bytes
from trainer.targets.shards import read_index
from trainer.training.run import run_on_all_gpus


def train_trial(
    trial: Trial,
    common: Mapping[str, Any],
    *,
    tokens_dir: str,
    targets: str,
    trials_uri: str,
    stop_at: int = 0,
) -> Outcome | None:
    """Train a trial; started again, it goes on from its own snapshots, or finds that it is done.

    A training that cannot go on, for its gradients or weights are not finite, is an outcome too: it
    would fail again, and the other trials go on.

    Args:
        trial: what is tried.
        common: settings of all trials.
        tokens_dir: token streams.
        targets: where the teacher's targets lie; not read by a trial of cross entropy alone.
        trials_uri: where trials have their locations.
        stop_at: updates after which it pauses, to be compared; 0 trains it to its end.

    Returns:
        What came of it; None on machines other than the first, which alone reports.

    Raises:
        LiquidError: the settings do not fit what they are for, or something failed that may go
            well the next time.
    """
    settings = trial.over(common) | {"tokens_dir": tokens_dir}
    # How many windows an update has may follow from grad_accum and the GPUs
    config = with_accumulation(resolve(given(**settings), {}), max(1, count_gpus())).config
    taught = targets if config.needs_teacher else ""
    tokens = read_info(read_bytes(f"{tokens_dir}/{INFO_NAME}", limit=INFO_LIMIT), tokens_dir)
    name = location_name(
        config, tokens.fingerprint, read_index(taught).fingerprint if taught else None
    )
    root = trials_uri.rstrip("/")
    place = f"{root}/{name}"
    settings |= {"teacher_targets": taught, "output_gcs_uri": place, "stop_at": stop_at or None}
    settings = {"compile_cache": f"{root}/{_shared_code()}"} | settings
    log.info("trial %s: %s", name, trial.dump())
    step, failed = stop_at or config.train_steps, ""
    try:
        if run_on_all_gpus(given(**settings)) is None:
            return None
        share_code(place, root)
        measured = loss_at(place, step, config.save_best_on)
    except TrainingError as error:
        log.warning("the trial cannot go on: %s", error)
        measured, failed = Measured(math.nan, 0, None), str(error)
    return Outcome(
        trial,
        control=not config.needs_teacher,
        place=place,
        step=step,
        loss=None if failed else measured.loss,
        tokens=measured.tokens,
        eval_tokens=measured.eval_tokens,
        failed=failed,
    )


def share_code(place: str, root: str) -> None:
    """Give what a trial has compiled to the other trials, where none has done so before.

    Most trials compile the same, and would each pay for it.

    Args:
        place: the trial's location.
        root: where trials have their locations.
    """
    shared, name = open_location(root), _shared_code()
    try:
        with contextlib.suppress(StorageMissingError):
            shared.stat(name)
            return
        shared.put_bytes(read_bytes(f"{place}/{COMPILE_CACHE}", limit=LIMIT), name)
    except StorageMissingError:
        return  # nothing is compiled on a CPU
    except StorageError as error:
        log.info("the compiled code is not shared: %s", error)  # perhaps another was first


def _shared_code() -> str:
    """The name of the code that trials share; that of another release of torch is of no use."""
    stem, _, ending = COMPILE_CACHE.rpartition(".")
    return f"{stem}_torch-{importlib.metadata.version('torch')}.{ending}"


@dataclass(frozen=True)
class Measured:
    """A run's loss after an update."""

    loss: float
    """In nats."""
    tokens: int
    """Trained on till then."""
    eval_tokens: int | None
    """The loss is a mean over; None where nothing tells."""


def loss_at(place: str, step: int, metric: str) -> Measured:
    """What a run's record says of an update.

    Args:
        place: the run's output location.
        step: updates done.
        metric: such as ``val_loss_student@512``.

    Raises:
        MetricsError: there was no evaluation then, or there is no whole record.
        TrainingError: the loss is not finite.
    """
    record = read_run(place)
    context = metric.partition("@")[2] or str(record.header["settings"]["block_size"]["value"])
    for line in record.evaluations:
        if line["step"] == step and metric in line:
            if not math.isfinite(line[metric]):
                raise TrainingError(f"{metric} is not finite at step {step}")
            return Measured(line[metric], int(line["tokens"]), line["eval_tokens"].get(context))
    raise MetricsError(
        f"{record.uri} tells no {metric} of step {step}; remove {place} to train the trial again"
    )
