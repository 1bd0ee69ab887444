"""Train at one context; used twice, for annealing and for the continuation."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def train(
    tokens: dsl.Input[dsl.Dataset],
    teacher_name: str,
    block_size: int,
    train_steps: int,
    warmup_steps: int,
    lr_peak: float,
    checkpoints: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    record: dsl.Output[dsl.Artifact],
    report: dsl.Output[dsl.HTML],
    initial: dsl.Input[dsl.Model] = None,
    compiled: dsl.Input[dsl.Model] = None,
    resume_gcs_uri: str = "",
    teacher_revision: str = "",
    teacher_targets: str = "",
    alpha: float = 0.5,
    temperature: float = 1.0,
    alpha_schedule: str = "",
    temp_schedule: str = "",
    eval_ctx_lens: str = "",
    grad_accum: int = 0,
    global_batch: int = 64,
    micro_batch: int = 8,
    eval_every: int = 500,
    save_every: int = 1000,
    log_interval: int = 50,
    save_best_on: str = "",
    seed: int = 42,
    hf_secret_name: str = "",
    more_settings: dict = {},  # noqa: B006 - kfp records the value itself
) -> NamedTuple("Trained", [("best_loss", float), ("best_step", int), ("steps", int)]):  # type: ignore[valid-type]
    """Checkpoints of a run, its record and a report; started again, it goes on from its snapshots.

    Those of an earlier stage, as `compiled`, give the code that it has compiled.
    """
    inputs = dict(locals())
    from trainer.runtime.commands import start_stage

    start_stage()

    import math
    from pathlib import Path

    from components.lineage import Lineage
    from components.training import settings_of
    from trainer import entrypoint, pick_best
    from trainer import report as reports
    from trainer.checkpoints.metadata import origin_digest, summary, targets_of
    from trainer.metrics.lines import METRICS
    from trainer.runtime.strict_json import dumps
    from trainer.storage.digests import as_sha256, digest_of_file
    from trainer.storage.places import place

    settings = settings_of(inputs)
    result = entrypoint.run_on_all_gpus(settings)
    if result is None:  # of several machines, the first one reports
        return (math.nan, -1, -1)
    best = pick_best.run(
        [settings["output_gcs_uri"]], settings.get("save_best_on", "val_loss_student")
    )
    checkpoints.metadata.update(summary(best.meta))
    for name, value in result.metrics.items():
        metrics.log_metric(name, value)
    metrics.uri, report.uri = f"{metrics.uri}.json", f"{report.uri}.html"
    Path(metrics.path).write_text(dumps(result.metrics, indent=2))
    record.uri = f"{checkpoints.uri}/{METRICS}"
    reports.write_stage_report([place(record.uri, record.path)], report.path)
    taught = as_sha256(targets_of(best.meta) or "")
    sources = {"tokens": tokens, "teacher_targets": taught, "compiled": compiled}
    lineage = Lineage(**sources, initial=origin_digest(best.meta))
    lineage.give(checkpoints, best.among)
    lineage.give(record, digest_of_file(place(record.uri, record.path)))
    lineage.give_each(metrics, report)
    return (best.value, best.step, result.step)
