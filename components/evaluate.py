"""Evaluate the best checkpoints of both phases, and the teacher, at several contexts."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate(
    tokens: dsl.Input[dsl.Dataset],
    before: dsl.Input[dsl.Model],
    after: dsl.Input[dsl.Model],
    teacher_name: str,
    eval_ctx_lens: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.HTML],
    table: dsl.Output[dsl.Markdown],
    record_before: dsl.Input[dsl.Artifact] = None,
    record_after: dsl.Input[dsl.Artifact] = None,
    teacher_revision: str = "",
    micro_batch: int = 8,
    hf_secret_name: str = "",
    more_settings: dict = {},  # noqa: B006 - kfp records the value itself
) -> NamedTuple("Evaluated", [("loss_before", float), ("loss_after", float)]):  # type: ignore[valid-type]
    """One row per checkpoint and context, and the report on both phases, whose records are read.

    Returns both losses at the longest context.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    import tempfile
    from pathlib import Path

    from components.lineage import Lineage
    from trainer import evaluate
    from trainer import report as reports
    from trainer.metrics.evaluated import METRICS_JSON
    from trainer.settings.layers import resolve
    from trainer.settings.values import given
    from trainer.storage.places import place

    settings = {
        "tokens_dir": place(tokens.uri, tokens.path),
        "teacher_name": teacher_name,
        "teacher_revision": teacher_revision,
        "eval_ctx_lens": eval_ctx_lens,
        "micro_batch": micro_batch,
        "hf_secret_name": hf_secret_name,
    }
    config = resolve(given(**(settings | more_settings)), {}).config
    places = [place(model.uri, model.path) for model in (before, after)]
    with tempfile.TemporaryDirectory() as scratch:
        rows = evaluate.run(config, places, scratch)
        metrics.uri, report.uri = f"{metrics.uri}.json", f"{report.uri}.html"
        table.uri = f"{table.uri}.md"
        Path(metrics.path).write_bytes(Path(scratch, METRICS_JSON).read_bytes())
        records = [place(one.uri, one.path) for one in (record_before, record_after) if one]
        reports.write_stage_report(records, report.path, text=table.path, evaluation=scratch)
    sources = {"before": before, "after": after, "tokens": tokens}
    lineage = Lineage(**sources, record_before=record_before, record_after=record_after)
    lineage.give_each(metrics, report, table)
    for row in rows:
        phase = "before" if row.checkpoint == places[0] else "after"
        metrics.log_metric(f"{phase} val_loss_student@{row.context}", row.student_loss)
        if row.teacher_loss is not None:
            metrics.log_metric(f"val_loss_teacher@{row.context}", row.teacher_loss)
    longest = [row.student_loss for row in rows if row.context == max(r.context for r in rows)]
    return (longest[0], longest[1])
