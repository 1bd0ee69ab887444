"""The connection to Vertex AI, and its failures in one line each."""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Iterator
from typing import Any

import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform

from pipelines.settings import Settings
from pipelines.stages import STAGES
from trainer.runtime.errors import LiquidError, UsageError

REQUEST_SECONDS = 60.0
_CONTEXT_LOOKS, _CONTEXT_SECONDS = 60, 2.0
_TELLING = ("FAILED", "CANCELLED", "CANCELLING", "CANCEL_PENDING", "RUNNING", "PENDING")
"""States of a task that say more of a loop than those of its other rounds, most first."""
_EXHAUSTED = 8
"""The code of RESOURCE_EXHAUSTED in a task's error."""
_NO_MACHINE = re.compile(r"RESOURCE_EXHAUSTED|resources are insufficient", re.IGNORECASE)
_QUOTA = re.compile(r"quota", re.IGNORECASE)
_REQUEST = re.compile(r"^(GET|POST) https?://\S+: ")


def connect(settings: Settings, *, send: bool = True) -> Any:
    """Set up the client; returns the credentials for jobs, None for the default ones.

    Args:
        settings: project, region and, for a private endpoint, ``api_endpoint``/``api_transport``.
        send: False where nothing will be sent, so that no credentials are needed.

    Raises:
        UsageError: a region that Vertex AI does not have.
    """
    logging.getLogger("google.cloud.aiplatform").setLevel(logging.ERROR)
    try:
        aiplatform.init(
            project=settings.project,
            location=settings.region,
            api_endpoint=settings.api_endpoint or None,
            api_transport=settings.api_transport or None,
        )
    except ValueError as error:
        reason = first_line(error).partition(", select from")[0]
        raise UsageError(
            f"REGION={settings.region!r}: {reason}; give one such as us-central1"
        ) from None
    return None if send else AnonymousCredentials()


def client(settings: Settings, version: str) -> Any:
    """The client of pipeline runs, after `connect`; ``v1beta1`` alone can repeat runs."""
    return aiplatform.initializer.global_config.create_client(
        client_class=aiplatform.utils.PipelineJobClientWithOverride,
        location_override=settings.region,
    ).select_version(version)


@contextlib.contextmanager
def readable_errors(settings: Settings) -> Iterator[None]:
    """Turn what the client raises into one line.

    Raises:
        LiquidError: what failed and what to do.
    """
    place = settings.api_endpoint or f"{settings.region}-aiplatform.googleapis.com"
    try:
        yield
    except (auth.DefaultCredentialsError, auth.RefreshError, api.Unauthorized) as error:
        raise LiquidError(
            f"not authenticated with Google Cloud ({first_line(error)}); run gcloud auth"
            " application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except api.Forbidden as error:
        raise LiquidError(
            f"permission denied in project {settings.project!r}: {first_line(error)}; the account"
            " needs roles/aiplatform.user, and roles/iam.serviceAccountUser on SERVICE_ACCOUNT"
        ) from None
    except (api.TooManyRequests, api.ResourceExhausted) as error:
        raise LiquidError(
            f"quota exhausted in {settings.region}: {first_line(error)}; ask for more, use another"
            " REGION, or fewer or other accelerators"
        ) from None
    except api.NotFound as error:
        raise LiquidError(f"not found at {place}: {first_line(error)}") from None
    except api.ServiceUnavailable as error:
        raise LiquidError(f"{place} cannot be reached or is down: {first_line(error)}") from None
    except (api.GoogleAPICallError, api.RetryError) as error:
        raise LiquidError(f"{place} answered: {first_line(error)}") from None
    except (requests.exceptions.RequestException, auth.TransportError) as error:
        raise LiquidError(
            f"{place} cannot be reached ({first_line(error)}); check REGION, API_ENDPOINT and the"
            " network"
        ) from None


def first_line(error: Exception) -> str:
    """What an error says, in one line of 300 characters at most."""
    first = next((said for said in error.args if isinstance(said, str)), "")
    message = getattr(error, "message", None) or first or str(error)
    shown = _REQUEST.sub("", " ".join(str(message).split()))
    return shown[:300] or type(error).__name__


def console_link(settings: Settings, job_id: str) -> str:
    """The run's page in the Google Cloud console."""
    return (
        "https://console.cloud.google.com/vertex-ai/locations/"
        f"{settings.region}/pipelines/runs/{job_id}?project={settings.project}"
    )


def schedules_link(settings: Settings) -> str:
    """The page of the Google Cloud console that lists, pauses and deletes schedules."""
    return (
        f"https://console.cloud.google.com/vertex-ai/pipelines/schedules?project={settings.project}"
    )


def create(settings: Settings, api: Any, job: Any, run_id: str) -> str:
    """Create a run; returns its full name.

    Raises:
        LiquidError: it was not created.
    """
    with readable_errors(settings):
        created = api.create_pipeline_job(
            parent=settings.place,
            pipeline_job=job,
            pipeline_job_id=run_id,
            timeout=REQUEST_SECONDS,
        )
    if not created.name:
        place = settings.api_endpoint or settings.region
        raise LiquidError(f"{place} answered without naming a run; check API_ENDPOINT")
    return str(created.name)


def open_experiment(settings: Settings) -> str:
    """The full name of the experiment that runs are listed in, made where there is none yet.

    Raises:
        UsageError: there is something else of that name.
        LiquidError: it cannot be found or made.
    """
    settings.check_experiment()
    if not settings.experiment:
        return ""
    with readable_errors(settings):
        try:
            experiment = aiplatform.Experiment.get_or_create(settings.experiment)
        except ValueError as error:
            raise UsageError(f"EXPERIMENT={settings.experiment}: {first_line(error)}") from None
        return str(experiment.resource_name)


def add_to_experiment(settings: Settings, api: Any, run: str, experiment: str) -> None:
    """List a run in an experiment, which shows its parameters, and its metrics as they come.

    Args:
        settings: project and region.
        api: the client of pipeline runs.
        run: its full name.
        experiment: as `open_experiment` gives it.

    Raises:
        LiquidError: the run is not in the experiment.
    """
    metadata = aiplatform.initializer.global_config.create_client(
        client_class=aiplatform.utils.MetadataClientWithOverride,
        location_override=settings.region,
    )
    with readable_errors(settings):
        for _ in range(_CONTEXT_LOOKS):
            job = api.get_pipeline_job(name=run, timeout=REQUEST_SECONDS)
            # Vertex AI makes it a while after the run
            if context := job.job_detail.pipeline_run_context.name:
                metadata.add_context_children(
                    context=experiment, child_contexts=[context], timeout=REQUEST_SECONDS
                )
                return
            time.sleep(_CONTEXT_SECONDS)
    raise LiquidError(f"Vertex AI keeps no metadata of {run} after {_CONTEXT_LOOKS} looks")


def look(settings: Settings, api: Any, name: str) -> tuple[str, dict[str, str]]:
    """The state of a run, and by title the states of its tasks.

    Raises:
        LiquidError: it cannot be looked at.
    """
    with readable_errors(settings):
        job = api.get_pipeline_job(name=name, timeout=REQUEST_SECONDS)
    details = details_of(job)
    around = {task.parent_task_id for task in details}
    states: dict[str, str] = {}
    for task in details:
        # Of conditions and loops, what is inside says more; the rounds of a loop have one name
        untaken = task.state.name == "NOT_TRIGGERED"
        if task.task_name and task.task_id not in around and not untaken:
            of_rounds = (task.state.name, states.get(task.task_name, ""))
            states[task.task_name] = next((s for s in _TELLING if s in of_rounds), of_rounds[0])
    return job.state.name.removeprefix("PIPELINE_STATE_"), states


def shortage(settings: Settings, api: Any, name: str) -> str:
    """Which stage of a run got no machine, and how to run it elsewhere; empty if none did.

    Raises:
        LiquidError: the run cannot be looked at.
    """
    with readable_errors(settings):
        job = api.get_pipeline_job(name=name, timeout=REQUEST_SECONDS)
    for task in details_of(job):
        said = " ".join(task.error.message.split())
        machine_name = next(
            (s.machine_name.upper() for s in STAGES.values() if s.title == task.task_name), ""
        )
        if not machine_name or task.state.name != "FAILED":
            continue
        if task.error.code != _EXHAUSTED and not _NO_MACHINE.search(said):
            continue
        what = "its quota is used up" if _QUOTA.search(said) else "it has no such machine free"
        return (
            f"{task.task_name} did not get its machine in {settings.region}, since {what}"
            f" ({said[:200]}); run it elsewhere, with make rerun RUN={name.rpartition('/')[2]}"
            f' STAGE={task.task_name} {machine_name}_MACHINES="TYPE:ACCELERATOR:COUNT, …", let it'
            f" wait, with {machine_name}_SCHEDULING=flex_start, or submit to another REGION"
        )
    return ""


def roots_of(details: list[Any]) -> dict[int, Any]:
    """By id of a task: the detail of the condition or loop around it all, or its own."""
    by_id = {task.task_id: task for task in details}

    def root(task: Any) -> Any:
        parent = by_id.get(task.parent_task_id)
        return task if parent is None or parent is task else root(parent)

    return {task.task_id: root(task) for task in details}


def details_of(job: Any) -> list[Any]:
    """The details of a run's tasks, without the run itself, which Vertex AI lists among them."""
    run_id = job.name.rpartition("/")[2]
    return [task for task in job.job_detail.task_details if task.task_name != run_id]
