"""What a check found, and how checks run: together, within a time, each whatever the others do."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import requests
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.protobuf.json_format import ParseError

from pipelines.vertex import first_line
from trainer.runtime.errors import LiquidError

Verdict = Literal["fine", "failed", "unchecked"]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    check: str
    verdict: Verdict
    said: str
    mend: str = ""
    """The command that mends it, or lets it be checked."""

    @property
    def line(self) -> str:
        """The finding in one line."""
        mend = f"; run: {self.mend}" if self.mend else ""
        reason = "could not be checked: " if self.verdict == "unchecked" else ""
        return f"{self.check}: {reason}{self.said}{mend}"


Check = Callable[[], Finding]
_OTHER_SHAPES = (AttributeError, TypeError, LookupError, ParseError)
"""What reading an answer of another shape than the service's comes to, also in its client."""


class GarbageError(LiquidError):
    """A service answered something that it never answers."""


def disabled(error: Exception) -> bool:
    """Whether a refusal means that the service is not enabled in the project."""
    return isinstance(error, api.Forbidden) and (
        error.reason == "SERVICE_DISABLED" or "has not been used in project" in str(error)
    )


def unchecked(check: str, error: Exception, project: str) -> Finding:
    """The finding where a service did not say what was asked."""
    said, mend = f"{type(error).__name__}: {first_line(error)}", ""
    if disabled(error):
        service = (getattr(error, "metadata", None) or {}).get("service", "")
        said = f"{service or 'its service'} is not enabled in project {project}"
        mend = f"gcloud services enable {service} --project={project}" if service else ""
    elif isinstance(error, api.Forbidden):
        said = f"your account may not look ({first_line(error)})"
    elif isinstance(error, (api.TooManyRequests, api.ResourceExhausted)):
        said = "the service wants fewer requests for now; try again in a minute"
    elif isinstance(error, (GarbageError, requests.exceptions.JSONDecodeError)):
        said = f"the service answered nonsense ({first_line(error)})"
    elif isinstance(error, _OTHER_SHAPES):
        said = f"the service answered nonsense ({said})"
    elif isinstance(error, (requests.exceptions.Timeout, api.DeadlineExceeded)):
        said = "the service did not answer in time"
    elif isinstance(error, (requests.exceptions.RequestException, auth.TransportError)):
        said = f"the service cannot be reached ({first_line(error)})"
    elif isinstance(error, (api.ServerError, api.RetryError)):
        said = f"the service is down ({first_line(error)})"
    return Finding(check, "unchecked", said, mend)


def run_checks(checks: Mapping[str, Check], seconds: float, project: str) -> list[Finding]:
    """Run checks at the same time; what has no answer in time is unchecked.

    Args:
        checks: by name.
        seconds: for all of them. A check that goes on longer is left behind, in a thread that
            does not keep the process.
        project: for messages.

    Returns:
        The findings, in the order of the checks.
    """
    answers: queue.Queue[tuple[str, Finding]] = queue.Queue()

    def run(name: str, check: Check) -> None:
        try:
            answers.put((name, check()))
        except Exception as error:  # noqa: BLE001 - whatever a client raises, the others go on
            answers.put((name, unchecked(name, error, project)))

    for name, check in checks.items():
        threading.Thread(target=run, args=(name, check), daemon=True).start()
    found: dict[str, Finding] = {}
    end = time.monotonic() + seconds
    while len(found) < len(checks):
        try:
            name, finding = answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            break
        found[name] = finding
    late = "no answer in time, of which PREFLIGHT_SECONDS gives more"
    return [found.get(name) or Finding(name, "unchecked", late) for name in checks]
