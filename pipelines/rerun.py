"""Run one stage of a Vertex AI pipeline run again, and what follows it.

    make rerun RUN=liquid-annealing-20250304050607 STAGE=continue-1024 \
        PARAMS="continue_train_steps=8000"

Everything else that succeeded, or came from the cache, is skipped. The new run is the old one, with
its image, machines, service account, network, key, labels and parameters, but for the parameters
given (and ``LABELS``, which are added). ``WAIT=1`` follows it, ``DRY_RUN=1`` prints the request,
``CACHE=0`` keeps the repeated tasks from being found in the cache. (In the local runner the cache
does all this: ``make run-local PARAMS=…``.)
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from pipelines.anneal import STAGE_NAMES
from pipelines.parameters import (
    check_cloud_parameters,
    check_parameters,
    parameter_defaults,
    parse_parameters,
)
from pipelines.settings import Settings, load_settings
from pipelines.submit import Switches, new_run_id
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.settings.flags import OneLineParser

_RUN_ID = re.compile(r"[a-z][a-z0-9-]{0,127}")
_FULL_NAME = re.compile(
    r"projects/(?P<project>[^/]+)/locations/(?P<region>[^/]+)/pipelineJobs/(?P<id>[^/]+)"
)
_PAGE = re.compile(
    r"https?://.*/locations/(?P<region>[^/]+)/pipelines/runs/(?P<id>[^/?#]+)"
    r"(\?(.*&)?project=(?P<project>[^&#]+))?.*"
)
_NUMBER_LABEL = "vertex-ai-pipelines-run-billing-id"


def task_names(spec: Mapping[str, Any]) -> dict[str, str]:
    """By key in a compiled pipeline: what the UI calls each task, in the spec's order."""
    return {key: task["taskInfo"]["name"] for key, task in spec["root"]["dag"]["tasks"].items()}


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


def in_order(spec: Mapping[str, Any]) -> list[str]:
    """The keys of all tasks, each after those it depends on."""
    tasks = spec["root"]["dag"]["tasks"]
    return sorted(tasks, key=lambda key: (-len(with_downstream(spec, key)), key))


def find_stage(spec: Mapping[str, Any], stage: str) -> str:
    """The key of the task that a user names, by its display name or its key.

    Raises:
        UsageError: there is none of that name; lists those that there are.
    """
    names = task_names(spec)
    by_name = {name: key for key, name in names.items()} | {key: key for key in names}
    if stage not in by_name:
        known = [names[key] for key in in_order(spec)]
        near = difflib.get_close_matches(stage, known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"STAGE={stage!r} is not in this run; {hint}It has {', '.join(known)}")
    return by_name[stage]


def run_name(settings: Settings, run: str) -> str:
    """A run's full name from its id, its full name, or the address of its page.

    Raises:
        UsageError: it is none of these.
    """
    found = _FULL_NAME.fullmatch(run) or _PAGE.fullmatch(run)
    parts = found.groupdict() if found else {"id": run}
    if not _RUN_ID.fullmatch(parts["id"]):
        raise UsageError(
            f"RUN={run!r} is no run's id, such as liquid-annealing-20250304050607, nor its full"
            " name, nor the address of its page"
        )
    # A project may also be named by its number there
    for name in ("region", "project"):
        there, here = parts.get(name) or "", getattr(settings, name)
        if there not in ("", here) and not there.isdecimal():
            raise UsageError(
                f"RUN={run!r} is in {there}, but {name.upper()}={here}; make them agree"
            )
    return f"projects/{settings.project}/locations/{settings.region}/pipelineJobs/{parts['id']}"


def check_reach(
    spec: Mapping[str, Any], repeated: list[str], parameters: Mapping[str, Any]
) -> list[str]:
    """Find parameters that the repeated tasks do not read.

    Args:
        spec: the original run's compiled pipeline.
        repeated: keys of the tasks that run again.
        parameters: those given.

    Returns:
        Remarks on parameters that skipped tasks have read too.

    Raises:
        UsageError: a parameter that only skipped tasks read, or none.
    """
    names, remarks = task_names(spec), []
    for parameter in parameters:
        readers = [
            key
            for key in in_order(spec)
            if any(
                value.get("componentInputParameter") == parameter
                for value in spec["root"]["dag"]["tasks"][key]
                .get("inputs", {})
                .get("parameters", {})
                .values()
            )
        ]
        skipped = [names[key] for key in readers if key not in repeated]
        if not readers:
            raise UsageError(f"PARAMS: this run has no parameter {parameter!r}; leave it out")
        if len(skipped) == len(readers):
            raise UsageError(
                f"PARAMS: {parameter} is read by {', '.join(skipped)}, which would be skipped; give"
                f" STAGE={skipped[0]}, or leave it out"
            )
        if skipped:
            remarks.append(
                f"note: {parameter} changes for what runs again, not for what is skipped:"
                f" {', '.join(skipped)}"
            )
    return remarks


def rerun(settings: Settings, run: str, stage: str, parameters: dict[str, Any]) -> None:
    """Create a run that repeats a stage and what follows it; prints its page.

    Raises:
        UsageError: something is missing, the stage is unknown, or a parameter would do nothing.
        VertexError: the run cannot be found, or the new one cannot be created.
    """
    switches = Switches.from_environment()
    check_cloud_parameters(parameters)
    given = {
        "RUN": (run, "a run's id, full name or page"),
        "STAGE": (stage, "the stage to repeat, e.g. continue-1024"),
    }
    settings.require(
        "project",
        "region",
        beside={name: what for name, (value, what) in given.items() if not value},
    )
    name = run_name(settings, run)
    from pipelines import vertex

    with vertex.readable_errors(settings):
        vertex.connect(settings)
        client = vertex.client(settings, "v1beta1")
        original = client.get_pipeline_job(name=name, timeout=vertex.REQUEST_SECONDS)
        request, remarks = _repetition(settings, original, stage, parameters, switches.cache)
        for remark in remarks:
            print(remark, file=sys.stderr if switches.dry_run else sys.stdout)
        if switches.dry_run:
            print(type(request).to_json(request))
            return
        created = client.create_pipeline_job(
            parent=f"projects/{settings.project}/locations/{settings.region}",
            pipeline_job=request,
            pipeline_job_id=new_run_id(),
            timeout=vertex.REQUEST_SECONDS,
        )
    vertex.report(settings, created, wait=switches.wait)


def _repetition(
    settings: Settings,
    original: Any,
    stage: str,
    parameters: Mapping[str, Any],
    cache: bool,
) -> tuple[Any, list[str]]:
    """The new run, and what to say of it: the original, but for parameters and tasks to skip.

    The library's own ``rerun`` is not used: it takes no CMEK key (a type of the wrong version).

    Raises:
        UsageError: see `rerun`.
        LiquidError: the original does not carry the number that a repetition refers to it by.
    """
    from google.cloud import aiplatform_v1beta1 as beta
    from google.protobuf import json_format

    number = original.labels.get(_NUMBER_LABEL, "")
    if not number.isdecimal():
        raise LiquidError(f"{original.name} cannot be repeated: it has no label {_NUMBER_LABEL}")
    spec = json_format.MessageToDict(original._pb.pipeline_spec)
    configs, repeated = _rerun_configs(spec, original, find_stage(spec, stage))
    remarks = check_reach(spec, repeated, parameters)
    _check_together(spec, original, parameters)
    if not cache:
        for key in repeated:
            spec["root"]["dag"]["tasks"][key]["cachingOptions"] = {"enableCache": False}
    # Its custom jobs have an account and a network of their own, the same ones
    remarks += _unused(settings, original)
    own_labels = {
        key: value for key, value in original.labels.items() if not key.startswith("vertex-ai-")
    }
    job = beta.PipelineJob(
        display_name=original.display_name,
        pipeline_spec=spec,
        runtime_config=original.runtime_config,
        labels=own_labels | dict(settings.labels),
        service_account=original.service_account,
        network=original.network,
        encryption_spec=original.encryption_spec,
        original_pipeline_job_id=int(number),
        pipeline_task_rerun_configs=configs,
    )
    for key, value in parameters.items():
        job.runtime_config.parameter_values[key] = value
    names = task_names(spec)
    return job, [f"runs again: {', '.join(names[key] for key in repeated)}", *remarks]


def _unused(settings: Settings, original: Any) -> list[str]:
    """What to say of settings that differ from the original run's."""
    kept = {"service_account": original.service_account, "network": original.network}
    return [
        f"{name.upper()}={getattr(settings, name)} is not used: a repetition keeps"
        f" {value or 'what the run had, none'}"
        for name, value in kept.items()
        if getattr(settings, name) not in ("", value)
    ]


def _rerun_configs(spec: Mapping[str, Any], original: Any, key: str) -> tuple[list[Any], list[str]]:
    """For each task of the original whether to skip it, and the keys of those that are not."""
    from google.cloud import aiplatform_v1beta1 as beta

    states = beta.PipelineTaskDetail.State
    keys = {name: key for key, name in task_names(spec).items()}
    again = with_downstream(spec, key)
    done, configs = set(), []
    for task in original.job_detail.task_details:
        if task.task_name == original.name.rpartition("/")[2]:
            continue  # the run itself, which is listed among its tasks
        own = keys.get(task.task_name, task.task_name)
        # Skipped is what came from the cache
        skip = task.state in (states.SUCCEEDED, states.SKIPPED) and own not in again
        if skip:
            done.add(own)
        configs.append(
            beta.PipelineTaskRerunConfig(
                task_id=task.task_id,
                task_name=task.task_unique_name or task.task_name,
                skip_task=skip,
            )
        )
    return configs, [key for key in in_order(spec) if key not in done]


def _check_together(spec: Mapping[str, Any], original: Any, parameters: Mapping[str, Any]) -> None:
    """The original's parameters with the given ones over them, by the trainer's own checks."""
    from google.protobuf import json_format

    inputs = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    values = {name: entry.get("defaultValue") for name, entry in inputs.items()}
    values |= json_format.MessageToDict(original._pb.runtime_config).get("parameterValues", {})
    values |= parameters
    # A run of another release may have other parameters
    known = parameter_defaults()
    check_parameters({name: values[name] for name in values if name in known}, processes_of(spec))


def processes_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """By stage, how many processes a compiled pipeline's custom training jobs run: one a GPU."""
    found = {}
    for task in spec["root"]["dag"]["tasks"].values():
        component = spec["components"][task["componentRef"]["name"]]
        inputs = component.get("inputDefinitions", {}).get("parameters", {})
        pools = inputs.get("worker_pool_specs", {}).get("defaultValue")
        given = task.get("inputs", {}).get("parameters", {}).get("worker_pool_specs", {})
        pools = given.get("runtimeValue", {}).get("constant", pools)
        for stage, name in STAGE_NAMES.items():
            if pools and task["taskInfo"]["name"] == name:
                found[stage] = int(
                    sum(
                        pool["replica_count"] * pool["machine_spec"].get("accelerator_count", 1)
                        for pool in pools
                    )
                )
    return found


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment."""
    OneLineParser("python -m pipelines.rerun", description=__doc__).parse_args(argv)
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    rerun(load_settings(), os.environ.get("RUN", ""), os.environ.get("STAGE", ""), parameters)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
