"""Submit the pipeline to Vertex AI or to open-source Kubeflow Pipelines.

    make submit-pipeline PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="seed=7" WAIT=1
    make submit-kfp HOST=http://… TRAINER_IMAGE=…

Everything comes from the environment or the settings file, see `pipelines.settings`; beside those
``PARAMS`` (the pipeline's parameters), ``WAIT=1`` (follow the run to its end), ``DRY_RUN=1`` (send
nothing; with ``JSON=1`` print the request), ``CACHE=0`` (run every task again) and, for Vertex AI,
``PREFLIGHT=0`` (send without the checks of `pipelines.preflight`, on the first machine that a stage
lists). Before a run is sent, its estimate is printed, as ``make estimate`` does.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pipelines.anneal import NAME, build_pipeline
from pipelines.compile import Build, compile_to
from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.prices import read_prices
from pipelines.estimates.stages import estimate
from pipelines.estimates.text import text
from pipelines.parameters import check_parameters, parameter_defaults, parameters_to_send
from pipelines.pins import with_revisions
from pipelines.settings import Settings, load_settings
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.settings.flags import OneLineParser

_PATIENCE = 10
"""Looks at a run that may fail one after another before it is no longer followed."""
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "CANCELED", "PAUSED", "SKIPPED")
"""Vertex AI and Kubeflow Pipelines spell the third of these states each in its own way."""


def switch(name: str, *, default: bool = False) -> bool:
    """An on/off variable of the environment.

    Raises:
        UsageError: it is neither 1 nor 0.
    """
    value = os.environ.get(name) or ("1" if default else "0")
    if value not in ("0", "1"):
        raise UsageError(f"{name}={value!r}: 1 or 0 is needed")
    return value == "1"


@dataclass(frozen=True)
class Switches:
    """How to submit: ``DRY_RUN``, ``WAIT`` and so on, read before anything is sent.

    Raises:
        UsageError: one of them is neither 1 nor 0, or ``JSON`` is 1 without ``DRY_RUN``.
    """

    dry_run: bool = field(default_factory=partial(switch, "DRY_RUN"))
    wait: bool = field(default_factory=partial(switch, "WAIT"))
    cache: bool = field(default_factory=partial(switch, "CACHE", default=True))
    preflight: bool = field(default_factory=partial(switch, "PREFLIGHT", default=True))
    request_alone: bool = field(default_factory=partial(switch, "JSON"))

    def __post_init__(self) -> None:
        if self.request_alone and not self.dry_run:
            raise UsageError("JSON=1 prints the request in place of sending it; give DRY_RUN=1 too")

    @property
    def look_first(self) -> bool:
        """Whether the checks of `pipelines.preflight` come first."""
        return self.preflight and not self.dry_run

    def show(self, expected: str) -> None:
        """Print what the run will take, but where the request alone is asked for."""
        if self.request_alone:
            return
        print(expected, flush=True)
        if self.dry_run:
            print("\nnothing is sent, by DRY_RUN=1; JSON=1 beside it prints the request")


def new_run_id(name: str = NAME) -> str:
    """An id for a new run. It holds the time, which no input of a task may."""
    return f"{name}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"


def estimate_of(
    settings: Settings, parameters: dict[str, Any], backend: str, switches: Switches
) -> Callable[[], str]:
    """Gives the estimate of the annealing's run; a wrong file of prices is told at once."""
    plan = plan_of_run(settings, parameters, backend, cache=switches.cache)
    return lambda: text(estimate(plan))


def submit_vertex(
    settings: Settings,
    parameters: dict[str, Any],
    switches: Switches,
    build: Build = build_pipeline,
    name: str = NAME,
    expected: Callable[[], str] | None = None,
) -> None:
    """Submit to Vertex AI Pipelines and print the run's page.

    Args:
        settings: from `ready_for_vertex`.
        parameters: of the pipeline.
        switches: say how.
        build: makes the pipeline.
        name: of the pipeline, which the run's begins with.
        expected: says what the run takes; the annealing's estimate by default.

    Raises:
        UsageError: something is missing or makes no sense.
        LiquidError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    expected = expected or estimate_of(settings, parameters, "vertex", switches)
    from google.cloud.aiplatform_v1 import PipelineJob

    from pipelines import vertex

    job_id = new_run_id(name)
    with vertex.readable_errors(settings):
        job = vertex_job(settings, parameters, switches, job_id, build, name)
        resource = job.to_dict()
        resource |= {"serviceAccount": settings.service_account, "network": settings.network}
        switches.show(expected())
        if switches.request_alone:
            request = {"parent": settings.place, "pipelineJobId": job_id, "pipelineJob": resource}
            print(json.dumps(request, indent=2, default=str))
        if switches.dry_run:
            return
        # Not PipelineJob.submit: it makes a bucket where PIPELINE_ROOT has a typo
        api, request = job.api_client, PipelineJob.from_json(json.dumps(resource))
    send_to_vertex(settings, api, request, job_id, wait=switches.wait)


def ready_for_vertex(
    settings: Settings,
    parameters: Mapping[str, Any],
    switches: Switches,
    stages: Iterable[str] | None = None,
    tasks: Mapping[str, int] = MappingProxyType({}),
) -> Settings:
    """The settings with the machines that can be had, everything else being there and allowed.

    Args:
        settings: where to, image and machines.
        parameters: of the pipeline.
        switches: say whether to look.
        stages: whose machines are looked at; None: of all that the parameters let run.
        tasks: how many there are of a stage at a time, where these are several.

    Raises:
        UsageError: something is missing or makes no sense.
        LiquidError: a check failed.
    """
    from pipelines.preflight import NEEDED, before_sending

    settings.require(*NEEDED).check_vertex()
    read_prices(settings.prices)
    if switches.look_first:
        settings = before_sending(settings, parameters, stages, tasks)
        if stages is None:
            check_parameters(parameters, settings.processes("vertex"))
    return settings


def vertex_job(
    settings: Settings,
    parameters: dict[str, Any],
    switches: Switches,
    job_id: str,
    build: Build = build_pipeline,
    name: str = NAME,
) -> Any:
    """The pipeline as a job of Vertex AI's client, not sent yet.

    Raises:
        UsageError: machines that Vertex AI would refuse, or a region that it does not have.
    """
    from google.cloud import aiplatform

    from pipelines import vertex

    with tempfile.TemporaryDirectory() as scratch:
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "vertex", build)
        credentials = vertex.connect(settings, send=not switches.dry_run)
        return aiplatform.PipelineJob(
            display_name=name,
            template_path=str(path),
            job_id=job_id,
            pipeline_root=settings.pipeline_root,
            parameter_values=parameters,
            enable_caching=switches.cache,
            encryption_spec_key_name=settings.cmek_key or None,
            labels=dict(settings.labels) or None,
            project=settings.project,
            location=settings.region,
            credentials=credentials,
        )


def send_to_vertex(settings: Settings, api: Any, job: Any, job_id: str, *, wait: bool) -> None:
    """Create a run, list it in the experiment, print its page and, with ``wait``, follow it.

    Raises:
        UsageError: ``EXPERIMENT`` cannot be one.
        LiquidError: it could not be created or listed, or did not end well.
    """
    from pipelines import vertex

    experiment = vertex.open_experiment(settings)
    name = vertex.create(settings, api, job, job_id)
    page = vertex.console_link(settings, name.rpartition("/")[2])
    print(f"submitted {name}\n{page}", flush=True)
    runs = vertex.client(settings, "v1")
    if experiment:
        try:
            vertex.add_to_experiment(settings, runs, name, experiment)
        except LiquidError as error:
            raise LiquidError(
                f"the run goes on, but is not in EXPERIMENT={settings.experiment}: {error}"
            ) from None
    if wait:
        look = partial(vertex.look, settings, runs, name)
        follow(look, page, settings.poll_seconds, partial(vertex.shortage, settings, runs, name))


def submit_kfp(
    settings: Settings,
    parameters: dict[str, Any],
    host: str,
    switches: Switches,
    build: Build = build_pipeline,
    name: str = NAME,
    expected: Callable[[], str] | None = None,
) -> None:
    """Submit to open-source Kubeflow Pipelines at ``host`` and print the run's page.

    The other arguments are those of `submit_vertex`.

    Raises:
        UsageError: something is missing.
        LiquidError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    require_kfp(settings, host)
    expected = expected or estimate_of(settings, parameters, "kfp", switches)
    request: dict[str, Any] = {
        "arguments": parameters,
        "run_name": new_run_id(name),
        "experiment_name": settings.experiment or name,
        **kfp_options(settings, switches),
        "namespace": settings.namespace or None,
    }

    def create(client: Any, path: str, namespace: str | None) -> Any:
        of_users = {"namespace": namespace}
        return client.create_run_from_pipeline_package(path, **request | of_users)

    sent = send_to_kfp(settings, host, switches, request, create, build, expected)
    if sent is None:
        return
    client, run = sent
    if not run.run_id:
        raise LiquidError(f"{host} answered without naming a run; check HOST and KFP_TOKEN")
    page = f"{host.rstrip('/')}/#/runs/details/{run.run_id}"
    print(f"submitted {page}", flush=True)
    if switches.wait:
        from pipelines import kubeflow

        follow(partial(kubeflow.look, client, host, run.run_id), page, settings.poll_seconds)


def kfp_options(settings: Settings, switches: Switches) -> dict[str, Any]:
    """What kfp's client takes for a run and for a recurring run alike."""
    return {
        "enable_caching": switches.cache,
        "pipeline_root": settings.pipeline_root or None,
        "service_account": settings.service_account or None,
    }


def require_kfp(settings: Settings, host: str, *names: str) -> None:
    """Refuse to go on without the address, the image and the settings named.

    Raises:
        UsageError: naming all that is missing.
    """
    beside = {} if host else {"HOST": "address of Kubeflow Pipelines, http://…"}
    settings.require(*names, "trainer_image", beside=beside)


def send_to_kfp(
    settings: Settings,
    host: str,
    switches: Switches,
    request: Mapping[str, Any],
    create: Callable[[Any, str, str | None], Any],
    build: Build,
    expected: Callable[[], str],
) -> tuple[Any, Any] | None:
    """Compile the pipeline for Kubeflow Pipelines, show what it takes, and send it.

    Args:
        settings: image, machines and namespace.
        host: address of Kubeflow Pipelines.
        switches: say how.
        request: what ``JSON=1`` prints before the pipeline.
        create: sends it, with the client, the path of the compiled pipeline and the namespace.
        build: makes the pipeline.
        expected: says what a run takes.

    Returns:
        The client and what ``create`` returns; None where nothing is sent, by ``DRY_RUN=1``.

    Raises:
        UsageError: machines that Kubernetes could not give, or a namespace is missing.
        LiquidError: it could not be sent.
    """
    from pipelines import kubeflow

    with tempfile.TemporaryDirectory() as scratch:
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "kfp", build)
        switches.show(expected())
        if switches.request_alone:
            print(json.dumps({"host": host, **request}, indent=2))
            print("---")
            print(path.read_text())
        if switches.dry_run:
            return None
        token = kubeflow.token_from_environment()
        client, namespace = kubeflow.connect(host, token, settings.namespace)
        with kubeflow.readable_errors(host):
            return client, create(client, str(path), namespace)


def follow(
    look: Callable[[], tuple[str, dict[str, str]]],
    page: str,
    poll_seconds: int,
    explain: Callable[[], str] = str,
) -> None:
    """Print the states of a run's tasks as they change, until the run ends.

    Ctrl-C ends the following alone.

    Args:
        look: gives the state of the run, and by title the states of its tasks.
        page: where the run can be seen.
        poll_seconds: between two looks.
        explain: what to say of a run that failed, beside its tasks; empty where nothing is known.

    Raises:
        LiquidError: the run did not end well; names the tasks that failed. Or it cannot be looked
            at any more.
    """
    shown: dict[str, str] = {}
    failures = 0
    try:
        while True:
            try:
                state, tasks = look()
                failures = 0
            except LiquidError as error:
                failures += 1
                if failures > _PATIENCE:
                    raise LiquidError(f"{error}; the run goes on: {page}") from None
            else:
                for title, now in tasks.items():
                    if shown.get(title) != now:
                        print(f"{time.strftime('%H:%M:%S')} {title}: {now.lower()}", flush=True)
                shown |= tasks
                if state in _ENDED:
                    break
            time.sleep(poll_seconds)
    except KeyboardInterrupt:
        print("no longer followed; the run goes on", file=sys.stderr)
        raise
    print(f"{time.strftime('%H:%M:%S')} run: {state.lower()}", flush=True)
    if state != "SUCCEEDED":
        failed = ", ".join(title for title, now in shown.items() if now == "FAILED")
        ending = f"; failed: {failed}" if failed else ""
        why = explain() if state == "FAILED" else ""
        raise LiquidError(f"the run ended as {state.lower()}{ending}{f'; {why}' if why else ''}")


def main(argv: list[str]) -> None:
    """The command line: ``vertex`` or ``kfp``; the rest comes from the environment."""
    set_up_logging()
    parser = OneLineParser("python -m pipelines.submit", description=__doc__)
    parser.add_argument("backend", choices=("vertex", "kfp"), nargs="?", default="vertex")
    backend = parser.parse_args(argv).backend
    settings = load_settings()
    parameters = parameters_to_send(settings, backend)
    known = parameter_defaults()
    parameters = with_revisions(parameters, known, hub=True, defaults=known)
    switches = Switches()
    if backend == "vertex":
        settings = ready_for_vertex(settings, parameters, switches)
        submit_vertex(settings, parameters, switches)
    else:
        submit_kfp(settings, parameters, os.environ.get("HOST", ""), switches)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
