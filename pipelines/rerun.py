"""Run one stage of a Vertex AI pipeline run again, and what follows it.

    make rerun RUN=liquid-annealing-20250304050607 STAGE=continue-1024 \
        PARAMS="continue_train_steps=8000"

Everything else that succeeded is skipped. The new run has the old one's parameters but for those
given. (In the local runner the cache does this: ``make run-local PARAMS=…``.)
"""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.parameters import parse_parameters
from pipelines.settings import Settings, load_settings
from pipelines.submit import switch
from trainer.config import run_command
from trainer.errors import UsageError


def stage_tasks(spec: Mapping[str, Any]) -> dict[str, str]:
    """By name, task key and display name alike: the key of a task in a compiled pipeline."""
    tasks = spec["root"]["dag"]["tasks"]
    keys = {key: key for key in tasks}
    return keys | {task["taskInfo"]["name"]: key for key, task in tasks.items()}


def with_downstream(spec: Mapping[str, Any], key: str) -> set[str]:
    """A task and every task that depends on it."""
    tasks = spec["root"]["dag"]["tasks"]
    found = {key}
    while True:
        more = {
            name for name, task in tasks.items() if found & set(task.get("dependentTasks", ()))
        } - found
        if not more:
            return found
        found |= more


def find_stage(spec: Mapping[str, Any], stage: str) -> str:
    """The key of the task that a user names.

    Raises:
        UsageError: there is none of that name; lists those that there are.
    """
    names = stage_tasks(spec)
    if stage not in names:
        tasks = spec["root"]["dag"]["tasks"]
        known = [task["taskInfo"]["name"] for task in tasks.values()]
        near = difflib.get_close_matches(stage, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"STAGE={stage!r} is not in this run{hint} It has {', '.join(known)}")
    return names[stage]


def rerun(settings: Settings, run: str, stage: str, parameters: dict[str, Any]) -> None:
    """Create a run that repeats a stage and what follows it; prints its page.

    Raises:
        UsageError: something is missing, or the stage is unknown.
        VertexError: the run cannot be found, or the new one cannot be created.
    """
    given = {"RUN (a run's id or full name)": run, "STAGE (e.g. continue-1024)": stage}
    missing = [name for name, value in given.items() if not value]
    if missing:
        raise UsageError(f"missing: {'; '.join(missing)}. Give them as make rerun RUN=… STAGE=…")
    settings.require("project", "region", "pipeline_root")
    # The preview client has no public name for it
    from google.cloud.aiplatform.preview.pipelinejob.pipeline_jobs import _PipelineJob
    from google.cloud.aiplatform_v1beta1 import PipelineTaskRerunConfig
    from google.protobuf import json_format

    from pipelines import vertex

    name = run
    if "/" not in run:
        name = f"projects/{settings.project}/locations/{settings.region}/pipelineJobs/{run}"
    with tempfile.TemporaryDirectory() as scratch, vertex.readable_errors(settings):
        vertex.connect(settings)
        original = _get(settings, name)
        spec = json_format.MessageToDict(original._pb.pipeline_spec)
        again = with_downstream(spec, find_stage(spec, stage))
        names = stage_tasks(spec)
        configs = [
            PipelineTaskRerunConfig(task_id=task.task_id, skip_task=False)
            for task in original.job_detail.task_details
            if names.get(task.task_name) in again
        ]
        path = Path(scratch) / "pipeline.json"
        path.write_text(json.dumps(spec))
        values = json_format.MessageToDict(original._pb.runtime_config).get("parameterValues", {})
        job = _PipelineJob(
            display_name=original.display_name,
            template_path=str(path),
            pipeline_root=settings.pipeline_root,
            enable_caching=switch("CACHE", default=True),
            encryption_spec_key_name=settings.cmek_key or None,
            labels=dict(settings.labels) or None,
        )
        job.rerun(
            original_pipelinejob_name=name,
            pipeline_task_rerun_configs=configs,
            parameter_values=values | parameters,
            service_account=settings.service_account or None,
            network=settings.network or None,
        )
    job_id = job.resource_name.rpartition("/")[2]
    tasks = spec["root"]["dag"]["tasks"]
    repeated = [task["taskInfo"]["name"] for key, task in tasks.items() if key in again]
    print(f"runs again: {', '.join(repeated)}")
    print(vertex.console_link(settings, job_id))
    if switch("WAIT"):
        vertex.follow(settings, job.resource_name)


def _get(settings: Settings, name: str) -> Any:
    """The original run, with the fields that a rerun needs."""
    from google.cloud.aiplatform import initializer, utils

    from pipelines import vertex

    client = initializer.global_config.create_client(
        client_class=utils.PipelineJobClientWithOverride, location_override=settings.region
    ).select_version("v1beta1")
    return client.get_pipeline_job(name=name, timeout=vertex.REQUEST_SECONDS)


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment."""
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    rerun(load_settings(), os.environ.get("RUN", ""), os.environ.get("STAGE", ""), parameters)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
