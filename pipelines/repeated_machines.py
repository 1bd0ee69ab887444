"""The machines of a run that is repeated: those that it had, or others where the settings say so.

``{STAGE}_MACHINES`` and ``{STAGE}_SCHEDULING`` count for what runs again; every other setting of a
machine stays that of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pipelines.settings import Settings
from pipelines.spec import Job, jobs_of
from pipelines.stages import SCHEDULING, Machine
from trainer.runtime.devices import EXPECTED_GPUS


def with_machines_of(
    spec: Mapping[str, Any], settings: Settings, titles: Iterable[str]
) -> Settings:
    """The settings with the machines of a run's custom jobs, and what is given in their place.

    Args:
        spec: the run's compiled pipeline.
        settings: of which ``{STAGE}_MACHINES`` and ``{STAGE}_SCHEDULING`` count.
        titles: of the tasks that run again; the others' machines are the settings'.

    Raises:
        UsageError: a machine that Vertex AI would refuse.
    """
    had = {stage: job.machine for stage, job in repeated_jobs(spec, titles).items()}
    merged = {
        stage: _merged(machine, settings.machines[stage], stage, settings.given)
        for stage, machine in had.items()
    }
    taken = replace(settings, machines={**settings.machines, **merged})
    for stage in merged:
        if _asked(stage, settings.given):
            taken.check_jobs(stage)
    return taken


def put_machines(spec: Mapping[str, Any], settings: Settings, titles: Iterable[str]) -> list[str]:
    """Put the machines that were asked for into a run's compiled pipeline.

    Args:
        spec: it is changed.
        settings: from `with_machines_of`, with the machines chosen.
        titles: of the tasks that run again.

    Returns:
        A remark for each stage that runs on another machine, or gets it in another way.
    """
    remarks = []
    for stage, job in repeated_jobs(spec, titles).items():
        before, machine = job.machine, settings.machines[stage]
        if not _asked(stage, settings.given) or _shown(before) == _shown(machine):
            continue
        pools = job.pools
        for pool in pools:
            pool["machine_spec"]["machine_type"] = machine.machine_type
            pool["machine_spec"]["accelerator_type"] = machine.accelerator_type
            pool["machine_spec"]["accelerator_count"] = machine.accelerator_count
            for variable in pool["container_spec"].get("env", ()):
                if variable["name"] == EXPECTED_GPUS:
                    variable["value"] = str(machine.accelerator_count)
        job.give("worker_pool_specs", pools)
        job.give("strategy", SCHEDULING[machine.scheduling])
        job.give("max_wait_duration", f"{machine.max_wait_hours * 3600}s")
        remarks.append(f"{job.task.title} runs on {_shown(machine)}, before on {_shown(before)}")
    return remarks


def repeated_jobs(spec: Mapping[str, Any], titles: Iterable[str]) -> dict[str, Job]:
    """By stage: the custom jobs among the tasks of these titles."""
    asked = set(titles)
    return {stage: job for stage, job in jobs_of(spec).items() if job.task.title in asked}


def _asked(stage: str, given: frozenset[str]) -> bool:
    return bool({f"{stage}_machines".upper(), f"{stage}_scheduling".upper()} & given)


def _merged(had: Machine, own: Machine, stage: str, given: frozenset[str]) -> Machine:
    if own.machines:
        had = replace(had, machines=own.machines).alternatives[0]
    if f"{stage}_scheduling".upper() in given:
        had = replace(had, scheduling=own.scheduling, max_wait_hours=own.max_wait_hours)
    return had


def _shown(machine: Machine) -> str:
    count = f"{machine.accelerator_count} x {machine.accelerator_type}"
    return f"{machine.machine_type} ({count}, {machine.scheduling})"
