"""Submit the pipeline to Vertex AI or to open-source Kubeflow Pipelines.

    make submit-pipeline PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="seed=7" WAIT=1
    make submit-kfp HOST=http://… TRAINER_IMAGE=…

Everything comes from the environment or the settings file, see `pipelines.settings`; beside those
``PARAMS`` (the pipeline's parameters), ``WAIT=1`` (follow the run to its end), ``DRY_RUN=1`` (print
the request and send nothing) and ``CACHE=0`` (run every task again).
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.anneal import NAME
from pipelines.compile import compile_to
from pipelines.parameters import check_cloud_parameters, check_parameters, parse_parameters
from pipelines.settings import Settings, load_settings
from pipelines.waiting import interruptible
from trainer.runtime.commands import run_command
from trainer.runtime.errors import LiquidError, UsageError
from trainer.settings.flags import OneLineParser


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
    """How to submit, read before anything is sent."""

    dry_run: bool
    wait: bool
    cache: bool

    @classmethod
    def from_environment(cls) -> Switches:
        """``DRY_RUN``, ``WAIT`` and ``CACHE``.

        Raises:
            UsageError: one of them is neither 1 nor 0.
        """
        return cls(switch("DRY_RUN"), switch("WAIT"), switch("CACHE", default=True))


def new_run_id() -> str:
    """The name of a run may hold the time; no input of a task does."""
    return f"{NAME}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"


def submit_vertex(settings: Settings, parameters: dict[str, Any]) -> None:
    """Submit to Vertex AI Pipelines and print the run's page.

    Raises:
        UsageError: something is missing or makes no sense.
        VertexError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    switches = Switches.from_environment()
    settings.require("project", "region", "pipeline_root", "trainer_image")
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1 import AcceleratorType, PipelineJob

    from pipelines import vertex

    settings.check_accelerators(AcceleratorType.__members__)
    job_id = new_run_id()
    with tempfile.TemporaryDirectory() as scratch, vertex.readable_errors(settings):
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "vertex")
        credentials = vertex.connect(settings, send=not switches.dry_run)
        job = aiplatform.PipelineJob(
            display_name=NAME,
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
        resource = job.to_dict()
        resource |= {"serviceAccount": settings.service_account, "network": settings.network}
        parent = f"projects/{settings.project}/locations/{settings.region}"
        if switches.dry_run:
            request = {"parent": parent, "pipelineJobId": job_id, "pipelineJob": resource}
            print(json.dumps(request, indent=2, default=str))
            return
        # Not PipelineJob.submit: it makes a bucket where PIPELINE_ROOT has a typo
        created = job.api_client.create_pipeline_job(
            parent=parent,
            pipeline_job=PipelineJob.from_json(json.dumps(resource)),
            pipeline_job_id=job_id,
            timeout=vertex.REQUEST_SECONDS,
        )
    vertex.report(settings, created, wait=switches.wait)


def submit_kfp(settings: Settings, parameters: dict[str, Any], host: str) -> None:
    """Submit to open-source Kubeflow Pipelines at ``host`` and print the run's page.

    Raises:
        UsageError: something is missing.
        LiquidError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    switches = Switches.from_environment()
    beside = {} if host else {"HOST": "address of Kubeflow Pipelines, http://…"}
    settings.require("trainer_image", beside=beside)
    from pipelines import kubeflow

    with tempfile.TemporaryDirectory() as scratch:
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "kfp")
        request: dict[str, Any] = {
            "arguments": parameters,
            "run_name": new_run_id(),
            "experiment_name": settings.experiment or NAME,
            "enable_caching": switches.cache,
            "pipeline_root": settings.pipeline_root or None,
            "service_account": settings.service_account or None,
            "namespace": settings.namespace or None,
        }
        if switches.dry_run:
            print(json.dumps({"host": host, **request}, indent=2))
            print("---")
            print(path.read_text())
            return
        token = kubeflow.token_from_environment()
        client, request["namespace"] = kubeflow.connect(host, token, settings.namespace)
        with kubeflow.readable_errors(host):
            run = client.create_run_from_pipeline_package(str(path), **request)
    if not run.run_id:
        raise LiquidError(f"{host} answered without naming a run; check HOST and KFP_TOKEN")
    print(f"submitted {kubeflow.run_page(host, run.run_id)}")
    if switches.wait:
        with interruptible():
            kubeflow.follow(client, host, run.run_id, settings.poll_seconds)


def main(argv: list[str]) -> None:
    """The command line: ``vertex`` or ``kfp``; the rest comes from the environment."""
    parser = OneLineParser("python -m pipelines.submit", description=__doc__)
    parser.add_argument("backend", choices=("vertex", "kfp"), nargs="?", default="vertex")
    backend = parser.parse_args(argv).backend
    settings = load_settings()
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    check_parameters(parameters, settings.processes(backend))
    check_cloud_parameters(parameters)
    if backend == "vertex":
        submit_vertex(settings, parameters)
    else:
        submit_kfp(settings, parameters, os.environ.get("HOST", ""))


if __name__ == "__main__":
    raise SystemExit(run_command(main))
