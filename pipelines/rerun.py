"""Run one stage of a Vertex AI pipeline run again, and what follows it.

    make rerun RUN=liquid-annealing-20250304050607 STAGE=continue \
        PARAMS="continue_train_steps=8000"

Everything else that succeeded, or came from the cache, is skipped. The new run is the old one, with
its image, machines, service account, network, key, labels and parameters, but for the parameters
given (and ``LABELS``, which are added). ``{STAGE}_MACHINES`` and ``{STAGE}_SCHEDULING`` move a
stage to other machines. The checks of `pipelines.preflight` come first, without ``PREFLIGHT=0``;
then what it will take is printed. ``WAIT=1`` follows it, ``DRY_RUN=1`` sends nothing and with
``JSON=1`` prints the request, ``CACHE=0`` keeps the repeated tasks from being found in the cache.
(In the local runner the cache does all this: ``make run-local PARAMS=…``.)
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf import json_format

from pipelines.anneal import build_pipeline
from pipelines.estimates.plan import Plan
from pipelines.estimates.prices import Prices, read_prices
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import text
from pipelines.grid import NAME as SEARCH
from pipelines.parameters import (
    check_cloud_parameters,
    check_parameters,
    parameter_defaults,
    parse_parameters,
)
from pipelines.pins import with_revisions
from pipelines.settings import Settings, load_settings
from pipelines.spec import (
    check_stage,
    compiled,
    find_stage,
    jobs_of,
    machine_of,
    processes_of,
    stage_of,
    tasks_of,
    with_downstream,
)
from pipelines.stages import STAGES
from pipelines.submit import Switches, new_run_id, send_to_vertex
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

_RUN_ID = re.compile(r"[a-z][a-z0-9-]{0,127}")
_NUMBER_LABEL = "vertex-ai-pipelines-run-billing-id"


def run_name(settings: Settings, run: str) -> str:
    """A run's full name from its id, its full name, or the address of its page.

    Raises:
        UsageError: it is none of these, or lies in another project or region than the settings'.
    """
    run_id = _id_of(run)
    if not _RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"RUN={run!r} is no run's id, such as liquid-annealing-20250304050607, nor its full"
            " name, nor the address of its page"
        )
    named = {
        "region": _part(r"/locations/([^/]+)/", run),
        "project": _part(r"\bprojects?[/=]([^/&#]+)", run),
    }
    for name, value in named.items():
        # A project may also be named by its number there
        if value not in ("", getattr(settings, name)) and not value.isdecimal():
            raise UsageError(
                f"RUN={run!r} is in {value}, but {name.upper()}={getattr(settings, name)}; make"
                " them agree"
            )
    return f"{settings.place}/pipelineJobs/{run_id}"


def _id_of(run: str) -> str:
    """A run's id, as far as its name or address tells one."""
    return _part(r"/(?:pipelineJobs|pipelines/runs)/([^/?#]+)", run) or run


def _part(pattern: str, run: str) -> str:
    found = re.search(pattern, run)
    return found[1] if found else ""


def check_no_search(name: str, run: str) -> None:
    """Refuse a run of a search, of which every trial goes on by itself.

    Args:
        name: of the run or its pipeline.
        run: the run's id.

    Raises:
        UsageError: it is one.
    """
    if name.startswith(SEARCH):
        raise UsageError(
            f"RUN={run} is a search, which is not repeated by stages; make search with its GRID"
            " again takes what has ended from the cache, and the other trials go on from their"
            " snapshots"
        )


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
    tasks, remarks = tasks_of(spec), []
    for parameter in parameters:
        readers = [key for key, task in tasks.items() if parameter in task.parameters]
        skipped = [tasks[key].title for key in readers if key not in repeated]
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
        LiquidError: the run cannot be found, or the new one cannot be created.
    """
    switches = Switches()
    check_cloud_parameters(parameters)
    named = {
        "RUN": (run, "a run's id, full name or page"),
        "STAGE": (stage, "the stage to repeat, e.g. continue"),
    }
    missing = {name: what for name, (value, what) in named.items() if not value}
    check_no_search(_id_of(run), _id_of(run))
    if stage:
        check_stage(stage, compiled(build_pipeline(Settings(), "local")))
    name = run_name(settings.require("project", "region", beside=missing), run)
    prices = read_prices(settings.prices)
    from pipelines import vertex

    with vertex.readable_errors(settings):
        vertex.connect(settings)
        api = vertex.client(settings, "v1beta1")
        original = api.get_pipeline_job(name=name, timeout=vertex.REQUEST_SECONDS)
    job, remarks, running = _repetition(original, stage, parameters, switches.cache)
    remarks += _with_machines(job, settings, running, look=switches.look_first)
    # Its custom jobs have an account and a network of their own, the same ones
    for key in ("service_account", "network"):
        kept, own = getattr(original, key), getattr(settings, key)
        if own not in ("", kept):
            kept = kept or "what the run had, none"
            remarks.append(f"{key.upper()}={own} is not used: a repetition keeps {kept}")
    job.labels.update(settings.labels)
    print("\n".join(remarks), file=sys.stderr if switches.request_alone else sys.stdout)
    plan = _plan(job, settings.region, running, prices, cache=switches.cache)
    switches.show(text(estimate(plan)))
    if switches.request_alone:
        print(type(job).to_json(job))
    if not switches.dry_run:
        send_to_vertex(settings, api, job, new_run_id(), wait=switches.wait)


def _with_machines(job: Any, settings: Settings, titles: list[str], *, look: bool) -> list[str]:
    """Put the machines that the settings list for what runs again into the new run.

    Args:
        job: the new run, which is changed.
        settings: of which machines count that `pipelines.repeated_machines` names.
        titles: of the tasks that run again.
        look: whether the checks of `pipelines.preflight` come first, which choose the machines.

    Returns:
        What to say of them.

    Raises:
        UsageError: a machine that Vertex AI would refuse.
        LiquidError: a check failed.
    """
    from pipelines.preflight import before_sending
    from pipelines.repeated_machines import put_machines, repeated_jobs, with_machines_of

    spec = _spec(job)
    settings = with_machines_of(spec, settings, titles)
    values = _values(job)
    if look:
        jobs = jobs_of(spec).values()
        images = [str(one.pools[0]["container_spec"]["image_uri"]) for one in jobs]
        of_run = replace(
            settings,
            pipeline_root=job.runtime_config.gcs_output_directory,
            service_account=job.service_account,
            trainer_image=images[0] if images else settings.trainer_image,
        )
        read = {name for t in tasks_of(spec).values() if t.title in titles for name in t.parameters}
        needed = {name: value for name, value in values.items() if name in read}
        # What only skipped tasks read may be gone
        asked = dict.fromkeys(("resume_gcs_uri", "dataset_name", "teacher_name"), "") | needed
        settings = before_sending(of_run, asked, repeated_jobs(spec, titles))
    remarks = put_machines(spec, settings, titles)
    if remarks:
        job.pipeline_spec = spec
        check_parameters(_known(values), processes_of(spec))
    return remarks


def _spec(job: Any) -> dict[str, Any]:
    """A run's compiled pipeline."""
    return dict(json_format.MessageToDict(job._pb.pipeline_spec))


def _values(job: Any) -> dict[str, Any]:
    """A run's parameters: those given, over the defaults of its pipeline."""
    inputs = _spec(job)["root"].get("inputDefinitions", {}).get("parameters", {})
    values = {name: entry.get("defaultValue") for name, entry in inputs.items()}
    given = json_format.MessageToDict(job._pb.runtime_config).get("parameterValues", {})
    return values | dict(given)


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those that this release has too."""
    return {name: values[name] for name in values if name in parameter_defaults()}


def _plan(job: Any, region: str, titles: list[str], prices: Prices, *, cache: bool) -> Plan:
    """What is to be estimated of the new run: the tasks of these titles, which run again."""
    spec, given = _spec(job), _values(job)
    # A stored run holds whole numbers as doubles
    values = {name: type(old)(given.get(name, old)) for name, old in parameter_defaults().items()}
    tasks = tasks_of(spec).values()
    again = [(stage_of(task), task.title) for task in tasks if task.title in titles]
    new = "these, by RUN and STAGE"
    new += ", unless one of an earlier run with the same inputs is in the cache" * cache
    return Plan(
        backend="vertex",
        region=region,
        stages=[at for at in again if not at[0] or STAGES[at[0]].runs_with(values)],
        machines={stage_of(task): machine_of(spec, task) for task in tasks},
        values=values,
        prices=prices,
        new=new,
    )


@dataclass(frozen=True)
class _Reach:
    """Which tasks of a run are repeated."""

    skipped: set[str]
    """What is skipped, by `Task.root`."""
    repeated: list[str]
    """Keys of the tasks that are not skipped."""
    running: list[str]
    """Titles of those that run, and not the other branch of a condition."""


def _reach(
    spec: Mapping[str, Any], original: Any, stage: str, parameters: Mapping[str, Any]
) -> _Reach:
    """What a repetition from a stage on repeats: that, what follows, and what did not succeed.

    Raises:
        UsageError: the run has no such stage.
    """
    from google.cloud import aiplatform_v1beta1 as beta

    from pipelines.vertex import details_of, roots_of

    tasks, states = tasks_of(spec), beta.PipelineTaskDetail.State
    again = {tasks[key].root for key in with_downstream(spec, find_stage(spec, stage))}
    details = details_of(original)
    # Skipped is what came from the cache
    skipped = {
        root.task_name
        for root in roots_of(details).values()
        if root.state in (states.SUCCEEDED, states.SKIPPED) and root.task_name not in again
    }
    repeated = [key for key, task in tasks.items() if task.root not in skipped]
    # The other branch of a condition runs only where what decides it is given
    idle = {task.task_name for task in details if task.state == states.NOT_TRIGGERED}
    idle -= {task.title for task in tasks.values() if task.deciding.intersection(parameters)}
    running = [tasks[key].title for key in repeated if tasks[key].title not in idle]
    return _Reach(skipped, repeated, running)


def _repetition(
    original: Any, stage: str, parameters: Mapping[str, Any], cache: bool
) -> tuple[Any, list[str], list[str]]:
    """The new run, what to say of it, and the titles of the tasks that run again.

    It is the original, but for parameters and tasks to skip.

    Raises:
        UsageError: see `rerun`.
        LiquidError: the original does not carry the number that a repetition refers to it by.
    """
    number = original.labels.get(_NUMBER_LABEL, "")
    if not number.isdecimal():
        raise LiquidError(f"{original.name} cannot be repeated: it has no label {_NUMBER_LABEL}")
    spec = _spec(original)
    check_no_search(str(spec.get("pipelineInfo", {}).get("name", "")), _id_of(original.name))
    known = spec["root"].get("inputDefinitions", {}).get("parameters", {})
    parameters = with_revisions(parameters, known, hub=True)  # of what is given, nothing else
    reach = _reach(spec, original, stage, parameters)
    remarks = [f"runs again: {', '.join(reach.running)}"]
    remarks += check_reach(spec, reach.repeated, parameters)
    tasks = tasks_of(spec)
    for key in reach.repeated if not cache else ():
        tasks[key].spec["cachingOptions"] = {"enableCache": False}
    job = _job(original, spec, number, reach.skipped)
    job.runtime_config.parameter_values.update(parameters)
    # The values together, by the trainer's own checks
    check_parameters(_known(_values(job)), processes_of(spec))
    return job, remarks, reach.running


def _job(original: Any, spec: dict[str, Any], number: str, skipped: set[str]) -> Any:
    """The original as a job to be sent again, which refers to it and skips some of its tasks.

    The library's own ``rerun`` is not used: it takes no CMEK key (a type of the wrong version).
    """
    from google.cloud import aiplatform_v1beta1 as beta

    from pipelines.vertex import details_of, roots_of

    details = details_of(original)
    roots = roots_of(details)
    return beta.PipelineJob(
        display_name=original.display_name,
        pipeline_spec=spec,
        runtime_config=original.runtime_config,
        labels={k: v for k, v in original.labels.items() if not k.startswith("vertex-ai-")},
        service_account=original.service_account,
        network=original.network,
        encryption_spec=original.encryption_spec,
        original_pipeline_job_id=int(number),
        pipeline_task_rerun_configs=[
            beta.PipelineTaskRerunConfig(
                task_id=task.task_id,
                task_name=task.task_unique_name or task.task_name,
                skip_task=roots[task.task_id].task_name in skipped,
            )
            for task in details
        ],
    )


def main(argv: list[str]) -> None:
    """The command line; everything comes from the environment."""
    set_up_logging()
    OneLineParser("python -m pipelines.rerun", description=__doc__).parse_args(argv)
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    rerun(load_settings(), os.environ.get("RUN", ""), os.environ.get("STAGE", ""), parameters)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
