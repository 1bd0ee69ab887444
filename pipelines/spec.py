"""What a compiled pipeline holds: tasks, their titles, order, parameters and processes.

It may be one of another release, whose stages have other titles. Tasks inside a condition or a loop
are listed among the others; a task of a loop stands for all its rounds.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Any

from google.protobuf import json_format

from pipelines.stages import SCHEDULING, STAGES, Machine
from trainer.runtime.errors import UsageError
from trainer.runtime.near_names import near_name

_BY_STRATEGY = {strategy: name for name, strategy in SCHEDULING.items()}
_OF_CONDITION = re.compile(r"inputs\.parameter_values\['([^']+)'\]")


@dataclass(frozen=True)
class Task:
    """A task that runs a component."""

    title: str
    spec: dict[str, Any]
    """As the YAML holds it."""
    parameters: frozenset[str]
    """The pipeline's parameters that it reads, and those that decide whether it runs."""
    deciding: frozenset[str]
    """Those that decide whether it runs; none for what always does."""
    after: frozenset[str]
    """Keys of the tasks that it depends on."""
    root: str
    """What it is part of at the pipeline's top: the title of a condition or loop, or its own."""


@dataclass(frozen=True)
class _Level:
    """A pipeline, or what is inside one of its conditions or loops."""

    root: str = ""
    """See `Task.root`; empty at the top."""
    names: Mapping[str, str] | None = None
    """By name of an input: the pipeline's parameter that it holds; None: they are these."""
    deciding: frozenset[str] = frozenset()
    """Parameters that decide whether its tasks run."""
    after: frozenset[str] = frozenset()
    """Keys of the tasks that it depends on."""

    def parameters(self, task: Mapping[str, Any]) -> dict[str, str]:
        """By name of an input of a task here: the pipeline's parameter that it holds."""
        inputs = task.get("inputs", {}).get("parameters", {})
        taken = {
            name: entry["componentInputParameter"]
            for name, entry in inputs.items()
            if "componentInputParameter" in entry
        }
        if self.names is None:
            return taken
        return {name: self.names[of] for name, of in taken.items() if of in self.names}


def compiled(pipeline: Any) -> dict[str, Any]:
    """What a pipeline compiles to, as its YAML would hold it."""
    return dict(json_format.MessageToDict(pipeline.pipeline_spec))


def tasks_of(spec: Mapping[str, Any]) -> dict[str, Task]:
    """By key, which is one of the whole pipeline: the tasks, each after those it depends on."""
    return _tasks(spec, spec["root"]["dag"], _Level())


def _tasks(spec: Mapping[str, Any], dag: Mapping[str, Any], level: _Level) -> dict[str, Task]:
    before = {key: sorted(task.get("dependentTasks", ())) for key, task in dag["tasks"].items()}
    found: dict[str, Task] = {}
    last: dict[str, frozenset[str]] = {}
    """By key at this level: the tasks that are the last ones there."""
    for key in TopologicalSorter(dict(sorted(before.items()))).static_order():
        task = dag["tasks"][key]
        title = task["taskInfo"]["name"]
        root = level.root or title
        names = level.parameters(task)
        after = _together(last[other] for other in before[key]) or level.after
        condition = task.get("triggerPolicy", {}).get("condition", "")
        deciding = level.deciding.union(
            names[name] for name in _OF_CONDITION.findall(condition) if name in names
        )
        component = spec["components"][task["componentRef"]["name"]]
        if "dag" not in component:
            parameters = deciding.union(names.values())
            found[key] = Task(title, task, parameters, deciding, after, root)
            last[key] = frozenset({key})
            continue
        inner = _tasks(spec, component["dag"], _Level(root, names, deciding, after))
        last[key] = frozenset(inner) - _together(one.after for one in inner.values())
        found |= inner
    return found


def _together(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset(itertools.chain.from_iterable(sets))


def titles_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """By key of a task: its title."""
    return {key: task.title for key, task in tasks_of(spec).items()}


def with_downstream(spec: Mapping[str, Any], key: str) -> set[str]:
    """The keys of a task, of every task that depends on it, and of what is repeated with them.

    What lies inside one condition or loop at the pipeline's top is repeated as a whole.
    """
    tasks = tasks_of(spec)
    roots = {tasks[key].root}
    for task in tasks.values():
        if any(tasks[other].root in roots for other in task.after):
            roots.add(task.root)
    return {key for key, task in tasks.items() if task.root in roots}


def find_stage(spec: Mapping[str, Any], stage: str) -> str:
    """The key of the task that a user names, by its title there or by its key.

    Raises:
        UsageError: there is none of that name; lists those that there are.
    """
    titles = titles_of(spec)
    for key, title in titles.items():
        if stage in (key, title):
            return key
    raise _no_stage(stage, "this run", list(titles.values()))


def check_stage(stage: str, spec: Mapping[str, Any]) -> None:
    """Refuse, before a run is looked at, a name that no release has had for a stage.

    A title of another release goes on from a word of this one's: ``continue-1024``.

    Args:
        stage: as a user names it.
        spec: this release's compiled pipeline.

    Raises:
        UsageError: lists the stages that there are.
    """
    titles = titles_of(spec)
    if stage.partition("-")[0] not in {
        name.partition("-")[0] for name in (*titles, *titles.values())
    }:
        raise _no_stage(stage, "the pipeline", list(titles.values()))


def _no_stage(stage: str, where: str, known: list[str]) -> UsageError:
    near = near_name(stage, known)
    has = f"did you mean {near}? It has" if near else "it has"
    return UsageError(f"STAGE={stage!r} is not in {where}; {has} {', '.join(known)}")


def stage_of(task: Task) -> str:
    """The key of a task's stage; empty for one of another release that is not known here.

    Titles change from release to release; a training is known by the parameters that it reads too.
    """
    for stage in STAGES.values():
        own = stage.configurable and f"{stage.key}_more_settings" in task.parameters
        if own or task.title == stage.title:
            return stage.key
    return ""


@dataclass(frozen=True)
class Job:
    """A task that is a custom training job."""

    task: Task
    defaults: Mapping[str, Any]
    """By name of an input: its definition, of which the job takes the default value."""

    def value(self, name: str) -> Any:
        """What the job has for an input of custom training jobs; None for none."""
        own = self.task.spec.get("inputs", {}).get("parameters", {}).get(name, {})
        default = self.defaults.get(name, {}).get("defaultValue")
        return own.get("runtimeValue", {}).get("constant", default)

    def give(self, name: str, value: Any) -> None:
        """Put another value there, in the spec that the job is part of."""
        inputs = self.task.spec.setdefault("inputs", {}).setdefault("parameters", {})
        inputs[name] = {"runtimeValue": {"constant": value}}

    @property
    def pools(self) -> list[dict[str, Any]]:
        """Its worker pools; none for a task that is no custom training job."""
        return list(self.value("worker_pool_specs") or ())

    @property
    def machine(self) -> Machine:
        """What it runs on, and how it gets it."""
        pools = self.pools
        first = pools[0]["machine_spec"]
        return Machine(
            machine_type=str(first.get("machine_type", "")),
            accelerator_type=str(first.get("accelerator_type", "")),
            accelerator_count=int(first.get("accelerator_count", 0)),
            replicas=sum(int(pool["replica_count"]) for pool in pools),
            scheduling=_BY_STRATEGY.get(str(self.value("strategy")), Machine.scheduling),
            max_wait_hours=self._hours("max_wait_duration", Machine.max_wait_hours),
            timeout_hours=self._hours("timeout", Machine.timeout_hours),
        )

    def _hours(self, name: str, default: int) -> int:
        """Of a duration as the service writes it, 259200s."""
        seconds = str(self.value(name)).removesuffix("s")
        return int(seconds) // 3600 if seconds.isdecimal() else default


def jobs_of(spec: Mapping[str, Any]) -> dict[str, Job]:
    """By key of a stage: its custom training job."""
    jobs = {stage_of(task): _job(spec, task) for task in tasks_of(spec).values()}
    return {stage: job for stage, job in jobs.items() if stage and job.pools}


def machine_of(spec: Mapping[str, Any], task: Task) -> Machine:
    """What a task runs on: the machines of its custom training job, or CPU and memory."""
    job = _job(spec, task)
    if job.pools:
        return job.machine
    executor = spec["deploymentSpec"]["executors"][_component(spec, task)["executorLabel"]]
    resources = executor["container"].get("resources", {})
    return Machine(
        cpu=str(resources.get("resourceCpuLimit", Machine.cpu)),
        memory=str(resources.get("resourceMemoryLimit", Machine.memory)),
    )


def _job(spec: Mapping[str, Any], task: Task) -> Job:
    return Job(task, _component(spec, task).get("inputDefinitions", {}).get("parameters", {}))


def _component(spec: Mapping[str, Any], task: Task) -> dict[str, Any]:
    return dict(spec["components"][task.spec["componentRef"]["name"]])


def processes_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """By stage, how many processes its custom training job runs: one a GPU."""
    machines = {stage: job.machine for stage, job in jobs_of(spec).items()}
    return {
        stage: machine.replicas * max(1, machine.accelerator_count)
        for stage, machine in machines.items()
    }
