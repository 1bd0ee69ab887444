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
from trainer.errors import LiquidError

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
    """
    logging.getLogger("google.cloud.aiplatform").setLevel(logging.ERROR)
    aiplatform.init(
        project=settings.project,
        location=settings.region,
        api_endpoint=settings.api_endpoint or None,
        api_transport=settings.api_transport or None,
    )
    return None if send else AnonymousCredentials()


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


def follow(settings: Settings, name: str) -> None:
    """Print each task's state as it changes, until the run ends.

    Raises:
        VertexError: it did not end well; names the tasks that failed.
    """
    shown: dict[str, str] = {}
    while True:
        with readable_errors(settings):
            job = aiplatform.PipelineJob.get(name).gca_resource
        state, tasks = _state_name(job.state), job.job_detail.task_details
        for task in tasks:
            now = _state_name(task.state)
            if task.task_name and shown.get(task.task_name) != now:
                shown[task.task_name] = now
                print(f"{time.strftime('%H:%M:%S')} {task.task_name}: {now.lower()}", flush=True)
        if state in _ENDED:
            break
        time.sleep(settings.poll_seconds)
    print(f"{time.strftime('%H:%M:%S')} run: {state.lower()}", flush=True)
    if state != "SUCCEEDED":
        failed = ", ".join(name for name, now in shown.items() if now == "FAILED") or "no task"
        raise VertexError(f"the run ended as {state.lower()}; failed: {failed}")


def _state_name(state: Any) -> str:
    return state.name.removeprefix("PIPELINE_STATE_")
