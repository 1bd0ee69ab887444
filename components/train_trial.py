"""Train a trial of a search, up to its end or to that of a rung."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train_trial(
    tokens: dsl.Input[dsl.Dataset],
    trial: str,
    common: dict,
    trials_uri: str,
    metrics: dsl.Output[dsl.Metrics],
    targets: dsl.Input[dsl.Dataset] = None,
    stop_at: int = 0,
    hf_secret_name: str = "",
) -> NamedTuple("Tried", [("outcome", str)]):  # type: ignore[valid-type]
    """What came of it, as JSON; started again, it goes on from its own snapshots.

    Its checkpoints lie at a place of its own under ``trials_uri``, whichever run of the pipeline it
    is part of, so that what is trained there already is not trained again. ``targets`` are the
    index of the teacher's targets, which tells where these lie.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    from pathlib import Path

    from components.lineage import Lineage
    from trainer.search.training import train_trial
    from trainer.search.trials import Trial
    from trainer.storage.places import place

    outcome = train_trial(
        Trial.parse(trial),
        common | {"hf_secret_name": hf_secret_name},
        tokens_dir=place(tokens.uri, tokens.path),
        targets=place(targets.uri, targets.path) if targets else "",
        trials_uri=trials_uri,
        stop_at=stop_at,
    )
    assert outcome is not None, "a trial has one machine"
    metrics.log_metric("step", outcome.step)
    if outcome.loss is not None:
        metrics.log_metric("loss", outcome.loss)
    metrics.uri = f"{metrics.uri}.json"
    Path(metrics.path).write_text(outcome.dump(), encoding="utf-8")
    Lineage(tokens=tokens, targets=targets).give(metrics)
    return (outcome.dump(),)
