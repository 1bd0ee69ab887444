"""Submit the pipeline to Vertex AI or to open-source Kubeflow Pipelines.

    make submit-pipeline PROJECT=… PIPELINE_ROOT=gs://… TRAINER_IMAGE=… PARAMS="seed=7" WAIT=1
    make submit-kfp HOST=http://… TRAINER_IMAGE=…

Everything comes from the environment or the settings file, see `pipelines.settings`; beside those
``PARAMS`` (the pipeline's parameters), ``WAIT=1`` (follow the run to its end), ``DRY_RUN=1`` (print
the request and send nothing) and ``CACHE=0`` (run every task again).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from pipelines.anneal import NAME
from pipelines.compile import compile_to
from pipelines.parameters import parse_parameters
from pipelines.settings import Settings, load_settings
from trainer.config import run_command
from trainer.errors import LiquidError, UsageError


def switch(name: str, *, default: bool = False) -> bool:
    """An on/off variable of the environment.

    Raises:
        UsageError: it is neither 1 nor 0.
    """
    value = os.environ.get(name) or ("1" if default else "0")
    if value not in ("0", "1"):
        raise UsageError(f"{name}={value!r}: 1 or 0 is needed")
    return value == "1"


def submit_vertex(settings: Settings, parameters: dict[str, Any]) -> None:
    """Submit to Vertex AI Pipelines and print the run's page.

    Raises:
        UsageError: something is missing.
        VertexError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    settings.require("project", "region", "pipeline_root", "trainer_image")
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1 import PipelineJob

    from pipelines import vertex

    dry = switch("DRY_RUN")
    # The name of a run may hold the time; no input of a task does
    job_id = f"{NAME}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}"
    with tempfile.TemporaryDirectory() as scratch, vertex.readable_errors(settings):
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "vertex")
        credentials = vertex.connect(settings, send=not dry)
        job = aiplatform.PipelineJob(
            display_name=NAME,
            template_path=str(path),
            job_id=job_id,
            pipeline_root=settings.pipeline_root,
            parameter_values=parameters,
            enable_caching=switch("CACHE", default=True),
            encryption_spec_key_name=settings.cmek_key or None,
            labels=dict(settings.labels) or None,
            project=settings.project,
            location=settings.region,
            credentials=credentials,
        )
        resource = job.to_dict()
        resource |= {"serviceAccount": settings.service_account, "network": settings.network}
        parent = f"projects/{settings.project}/locations/{settings.region}"
        if dry:
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
    print(f"submitted {created.name}")
    print(vertex.console_link(settings, job_id))
    if switch("WAIT"):
        vertex.follow(settings, created.name)


def submit_kfp(settings: Settings, parameters: dict[str, Any], host: str) -> None:
    """Submit to open-source Kubeflow Pipelines at ``host`` and print the run's page.

    Raises:
        UsageError: something is missing.
        LiquidError: it could not be sent, or, with ``WAIT=1``, the run failed.
    """
    if not host:
        raise UsageError("missing: HOST (address of Kubeflow Pipelines); give make HOST=http://…")
    settings.require("trainer_image")
    import kfp
    import kfp_server_api
    import urllib3

    with tempfile.TemporaryDirectory() as scratch:
        path = compile_to(Path(scratch) / "pipeline.yaml", settings, "kfp")
        if switch("DRY_RUN"):
            print(json.dumps({"host": host, "parameters": parameters}, indent=2))
            print(path.read_text())
            return
        token = os.environ.get("KFP_TOKEN")
        _check_host(host, token)
        # kfp logs tracebacks of its own beside the exceptions it raises
        logging.getLogger().setLevel(logging.CRITICAL)
        warnings.simplefilter("ignore")
        try:
            client = kfp.Client(host=host, existing_token=token)
            run = client.create_run_from_pipeline_package(
                str(path),
                arguments=parameters,
                run_name=f"{NAME}-{time.strftime('%Y%m%d%H%M%S', time.gmtime())}",
                experiment_name=settings.experiment or NAME,
                enable_caching=switch("CACHE", default=True),
                pipeline_root=settings.pipeline_root or None,
                service_account=settings.service_account or None,
            )
            print(f"submitted {host.rstrip('/')}/#/runs/details/{run.run_id}")
            if switch("WAIT"):
                ended = client.wait_for_run_completion(run.run_id, timeout=30 * 24 * 3600)
                print(f"run: {ended.state.lower()}")
                if ended.state != "SUCCEEDED":
                    raise LiquidError(f"the run ended as {ended.state.lower()}")
        except kfp_server_api.ApiException as error:
            reason = f"{error.status} {error.reason}"
            raise LiquidError(
                f"{host} refused the run: {reason}; check HOST and KFP_TOKEN"
            ) from None
        except (urllib3.exceptions.HTTPError, TimeoutError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise LiquidError(f"{host} cannot be reached: {reason}") from None


def _check_host(host: str, token: str | None) -> None:
    """One quick look, since `kfp.Client` asks again and again before it gives up."""
    import requests

    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        url = f"{host.rstrip('/')}/apis/v2beta1/healthz"
        answer = requests.get(url, headers=headers, timeout=10.0)
    except requests.exceptions.RequestException as error:
        reason = " ".join(str(error).split())[:200]
        raise LiquidError(f"{host} cannot be reached: {reason}; check HOST") from None
    if not answer.ok:
        reason = f"{answer.status_code} {answer.reason}"
        raise LiquidError(f"{host} refused the run: {reason}; check HOST and KFP_TOKEN")


def main(argv: list[str]) -> None:
    """The command line: ``vertex`` or ``kfp``."""
    backend = argv[0] if argv else "vertex"
    settings = load_settings()
    parameters = parse_parameters(os.environ.get("PARAMS", ""))
    if backend == "vertex":
        submit_vertex(settings, parameters)
    elif backend == "kfp":
        submit_kfp(settings, parameters, os.environ.get("HOST", ""))
    else:
        raise UsageError(f"{backend!r}: choose vertex or kfp")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
