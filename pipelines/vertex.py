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
from pipelines.waiting import PATIENCE, interruptible
from trainer.runtime.errors import LiquidError, UsageError

REQUEST_SECONDS = 60.0
_REQUEST = re.compile(r"^(GET|POST) https?://\S+: ")
_ENDED = ("SUCCEEDED", "FAILED", "CANCELLED", "PAUSED")


class VertexError(LiquidError):
    """Vertex AI could not be reached, or refused."""


def connect(settings: Settings, *, send: bool = True) -> Any:
    """Set up the client; returns the credentials to construct jobs with (None: the default ones).

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
        reason = _first_line(error).partition(", select from")[0]
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
        VertexError: what failed and what to do.
    """
    place = settings.api_endpoint or f"{settings.region}-aiplatform.googleapis.com"
    try:
        yield
    except (auth.DefaultCredentialsError, auth.RefreshError, api.Unauthorized) as error:
        raise VertexError(
            f"not authenticated with Google Cloud ({_first_line(error)}); run gcloud auth"
            " application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
        ) from None
    except api.Forbidden as error:
        raise VertexError(
            f"permission denied in project {settings.project!r}: {_first_line(error)}; the account"
            " needs roles/aiplatform.user, and roles/iam.serviceAccountUser on SERVICE_ACCOUNT"
        ) from None
    except (api.TooManyRequests, api.ResourceExhausted) as error:
        raise VertexError(
            f"quota exhausted in {settings.region}: {_first_line(error)}; ask for more, use another"
            " REGION, or fewer or other accelerators"
        ) from None
    except api.NotFound as error:
        raise VertexError(f"not found at {place}: {_first_line(error)}") from None
    except api.ServiceUnavailable as error:
        raise VertexError(f"{place} cannot be reached or is down: {_first_line(error)}") from None
    except (api.GoogleAPICallError, api.RetryError) as error:
        raise VertexError(f"{place} answered: {_first_line(error)}") from None
    except (requests.exceptions.RequestException, auth.TransportError) as error:
        raise VertexError(
            f"{place} cannot be reached ({_first_line(error)}); check REGION, API_ENDPOINT and the"
            " network"
        ) from None


def _first_line(error: Exception) -> str:
    message = getattr(error, "message", None) or str(error)
    shown = _REQUEST.sub("", " ".join(str(message).split()))
    return shown[:300] or type(error).__name__


def console_link(settings: Settings, job_id: str) -> str:
    """The run's page in the Google Cloud console."""
    return (
        "https://console.cloud.google.com/vertex-ai/locations/"
        f"{settings.region}/pipelines/runs/{job_id}?project={settings.project}"
    )


def report(settings: Settings, created: Any, *, wait: bool) -> None:
    """Print what has been created and its page; with ``wait``, follow it to its end.

    Raises:
        VertexError: nothing was created, or the run did not end well.
    """
    if not created.name:
        place = settings.api_endpoint or settings.region
        raise VertexError(f"{place} answered without naming a run; check API_ENDPOINT")
    print(f"submitted {created.name}")
    print(console_link(settings, created.name.rpartition("/")[2]), flush=True)
    if wait:
        with interruptible():
            follow(settings, created.name)


def follow(settings: Settings, name: str) -> None:
    """Print each task's state as it changes, until the run ends.

    Raises:
        VertexError: it did not end well; names the tasks that failed. Or it cannot be looked at
            any more.
    """
    shown: dict[str, str] = {}
    failures = 0
    looker = client(settings, "v1")
    while True:
        try:
            with readable_errors(settings):
                job = looker.get_pipeline_job(name=name, timeout=REQUEST_SECONDS)
            failures = 0
        except VertexError as error:
            failures += 1
            if failures > PATIENCE:
                page = console_link(settings, name.rpartition("/")[2])
                raise VertexError(f"{error}; the run goes on: {page}") from None
            time.sleep(settings.poll_seconds)
            continue
        state = _state_name(job.state)
        # The run itself is listed among its tasks
        run_id = name.rpartition("/")[2]
        _show_changes([t for t in job.job_detail.task_details if t.task_name != run_id], shown)
        if state in _ENDED:
            break
        time.sleep(settings.poll_seconds)
    print(f"{time.strftime('%H:%M:%S')} run: {state.lower()}", flush=True)
    if state != "SUCCEEDED":
        failed = ", ".join(name for name, now in shown.items() if now == "FAILED") or "no task"
        raise VertexError(f"the run ended as {state.lower()}; failed: {failed}")


def _show_changes(tasks: Any, shown: dict[str, str]) -> None:
    for task in tasks:
        now = _state_name(task.state)
        if task.task_name and shown.get(task.task_name) != now:
            shown[task.task_name] = now
            print(f"{time.strftime('%H:%M:%S')} {task.task_name}: {now.lower()}", flush=True)


def _state_name(state: Any) -> str:
    return state.name.removeprefix("PIPELINE_STATE_")
