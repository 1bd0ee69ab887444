"""What a compiled pipeline holds: tasks, their titles, order, parameters and processes.

It may be one of another release, whose stages have other titles.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from graphlib import TopologicalSorter
from typing import Any

from google.protobuf import json_format

from pipelines.stages import STAGES
from trainer.runtime.errors import UsageError


def compiled(pipeline: Any) -> dict[str, Any]:
    """What a pipeline compiles to, as its YAML would hold it."""
    return dict(json_format.MessageToDict(pipeline.pipeline_spec))


def tasks_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """By key: the tasks."""
    return dict(spec["root"]["dag"]["tasks"])


def titles_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """By key of a task: its title."""
    return {key: task["taskInfo"]["name"] for key, task in tasks_of(spec).items()}


def in_order(spec: Mapping[str, Any]) -> list[str]:
    """The keys of the tasks, each after those it depends on."""
    tasks = sorted(tasks_of(spec).items())
    before = {key: task.get("dependentTasks", ()) for key, task in tasks}
    return list(TopologicalSorter(before).static_order())


def with_downstream(spec: Mapping[str, Any], key: str) -> set[str]:
    """The keys of a task and of every task that depends on it."""
    again = {key}
    for other in in_order(spec):
        if again.intersection(tasks_of(spec)[other].get("dependentTasks", ())):
            again.add(other)
    return again


def find_stage(spec: Mapping[str, Any], stage: str) -> str:
    """The key of the task that a user names, by its title there or by its key.

    Raises:
        UsageError: there is none of that name; lists those that there are.
    """
    titles = titles_of(spec)
    for key, title in titles.items():
        if stage in (key, title):
            return key
    known = [titles[key] for key in in_order(spec)]
    near = difflib.get_close_matches(stage, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"STAGE={stage!r} is not in this run; {hint}It has {', '.join(known)}")


def parameters_of(task: Mapping[str, Any]) -> set[str]:
    """The pipeline's parameters that a task reads."""
    inputs = task.get("inputs", {}).get("parameters", {}).values()
    return {
        entry["componentInputParameter"] for entry in inputs if "componentInputParameter" in entry
    }


def processes_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """By stage, how many processes its custom training job runs: one a GPU.

    A stage's task is known by the parameters that it reads: titles change from release to release.
    """
    processes = {}
    for task in tasks_of(spec).values():
        component = spec["components"][task["componentRef"]["name"]]
        inputs = component.get("inputDefinitions", {}).get("parameters", {})
        pools = inputs.get("worker_pool_specs", {}).get("defaultValue")
        own = task.get("inputs", {}).get("parameters", {}).get("worker_pool_specs", {})
        pools = own.get("runtimeValue", {}).get("constant", pools)
        for stage in STAGES.values() if pools else ():
            if stage.configurable and f"{stage.key}_more_settings" in parameters_of(task):
                processes[stage.key] = sum(
                    int(pool["replica_count"] * pool["machine_spec"].get("accelerator_count", 1))
                    for pool in pools
                )
    return processes
