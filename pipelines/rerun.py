"""Run one stage of a Vertex AI pipeline run again, and what follows it.

    make rerun RUN=liquid-annealing-20250304050607 STAGE=continue-1024 \
        PARAMS="continue_train_steps=8000"

Everything else that succeeded is skipped. The new run has the old one's parameters but for those
given. (In the local runner the cache does this: ``make run-local PARAMS=…``.)
"""

from __future__ import annotations

import difflib
import os
import time
from collections.abc import Mapping
from typing import Any

from pipelines.anneal import NAME
from pipelines.parameters import parse_parameters
from pipelines.settings import Settings, load_settings
from pipelines.submit import switch
from trainer.config import run_command
from trainer.errors import LiquidError, UsageError


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
    settings.require("project", "region")
    from google.protobuf import json_format

    from pipelines import vertex

    name = run
    if "/" not in run:
        name = f"projects/{settings.project}/locations/{settings.region}/pipelineJobs/{run}"
    with vertex.readable_errors(settings):
        vertex.connect(settings)
        client = _client(settings)
        original = client.get_pipeline_job(name=name, timeout=vertex.REQUEST_SECONDS)
        spec = json_format.MessageToDict(original._pb.pipeline_spec)
        again = with_downstream(spec, find_stage(spec, stage))
        created = client.create_pipeline_job(
            parent=f"projects/{settings.project}/locations/{settings.region}",
            pipeline_job=_repetition(settings, original, stage_tasks(spec), again, parameters),
            pipeline_job_id=f"{NAME}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}",
            timeout=vertex.REQUEST_SECONDS,
        )
    tasks = spec["root"]["dag"]["tasks"]
    repeated = [task["taskInfo"]["name"] for key, task in tasks.items() if key in again]
    print(f"runs again: {', '.join(repeated)}")
    print(vertex.console_link(settings, created.name.rpartition("/")[2]))
    if switch("WAIT"):
        vertex.follow(settings, created.name)


def _repetition(
    settings: Settings,
    original: Any,
    names: Mapping[str, str],
    again: set[str],
    parameters: Mapping[str, Any],
) -> Any:
    """The new run: as the original, but for the parameters given and the tasks to skip.

    The library's own ``rerun`` is not used: it takes no CMEK key (a type of the wrong version).

    Raises:
        LiquidError: the original does not carry the number that a repetition refers to it by.
    """
    from google.cloud import aiplatform_v1beta1 as beta

    number = original.labels.get("vertex-ai-pipelines-run-billing-id", "")
    if not number.isdecimal():
        raise LiquidError(
            f"{original.name} cannot be repeated: it has no label"
            " vertex-ai-pipelines-run-billing-id"
        )
    done = beta.PipelineTaskDetail.State.SUCCEEDED
    configs = [
        beta.PipelineTaskRerunConfig(
            task_id=task.task_id,
            task_name=task.task_unique_name or task.task_name,
            skip_task=task.state == done and names.get(task.task_name) not in again,
        )
        for task in original.job_detail.task_details
    ]
    job = beta.PipelineJob(
        display_name=original.display_name,
        pipeline_spec=original.pipeline_spec,
        runtime_config=original.runtime_config,
        labels=dict(settings.labels),
        service_account=settings.service_account or original.service_account,
        network=settings.network or original.network,
        encryption_spec=original.encryption_spec,
        original_pipeline_job_id=int(number),
        pipeline_task_rerun_configs=configs,
    )
    for key, value in parameters.items():
        job.runtime_config.parameter_values[key] = value
    return job


def _client(settings: Settings) -> Any:
    """The v1beta1 client, which alone can repeat runs."""
    from google.cloud.aiplatform import initializer, utils

    return initializer.global_config.create_client(
        client_class=utils.PipelineJobClientWithOverride, location_override=settings.region
    ).select_version("v1beta1")


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment."""
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    rerun(load_settings(), os.environ.get("RUN", ""), os.environ.get("STAGE", ""), parameters)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
