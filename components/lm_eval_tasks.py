"""Run tasks of lm-eval on the exported student."""

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def lm_eval_tasks(
    model: dsl.Input[dsl.Model],
    tasks: str,
    metrics: dsl.Output[dsl.Metrics],
    report: dsl.Output[dsl.Markdown],
    limit: int = 0,
    seed: int = 42,
    hf_secret_name: str = "",
) -> int:
    """Results as JSON and as a table, each number a metric too; returns how many there are."""
    from trainer.runtime.commands import start_stage

    start_stage()

    import tempfile
    from pathlib import Path

    from components.lineage import Lineage
    from trainer import lm_eval_tasks
    from trainer.settings.config import LmEvalSettings
    from trainer.settings.layers import resolve
    from trainer.settings.values import given, parse_value
    from trainer.storage.places import place

    own = LmEvalSettings(tasks=parse_value("tasks", tasks), limit=limit)
    config = resolve(given(seed=seed, hf_secret_name=hf_secret_name), {}).config
    metrics.uri, report.uri = f"{metrics.uri}.json", f"{report.uri}.md"
    with tempfile.TemporaryDirectory() as scratch:
        numbers = lm_eval_tasks.run(place(model.uri, model.path), scratch, own, config)
        Path(metrics.path).write_bytes(Path(scratch, lm_eval_tasks.RESULTS).read_bytes())
        Path(report.path).write_bytes(Path(scratch, lm_eval_tasks.TABLE).read_bytes())
    for name, value in numbers.items():
        metrics.log_metric(name, value)
    Lineage(model=model).give_each(metrics, report)
    return len(numbers)
