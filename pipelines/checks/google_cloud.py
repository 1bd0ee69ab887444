"""Requests to Google Cloud's services that no client library here knows, as one account.

A service is found where gcloud would find it: at
``CLOUDSDK_API_ENDPOINT_OVERRIDES_{SERVICE}`` if that is set, else at the service's address in the
universe of the credentials. Cloud Storage is asked by its own client, which
``STORAGE_EMULATOR_HOST`` leads elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import google.auth
import requests
from google.api_core import exceptions as api
from google.auth.transport.requests import AuthorizedSession, Request
from google.cloud import storage
from google.oauth2.credentials import Credentials

from pipelines.checks.findings import GarbageError

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
TIMEOUT = (5.0, 15.0)
"""Seconds to connect, and between two pieces of an answer."""
_PATHS = {"compute": "compute/v1/"}
"""What addresses of a service have in front, where gcloud counts it to the endpoint."""
_MOST_PAGES = 20


class Account:
    """Requests as one account, each with its time limit and without repetition."""

    def __init__(self, credentials: Any) -> None:
        self.credentials = credentials

    @property
    def email(self) -> str:
        """Of a service account; empty for others, whose credentials do not tell."""
        return str(getattr(self.credentials, "service_account_email", "") or "")

    @property
    def member(self) -> str:
        """The account as a command names it in ``--member``."""
        if "@" in self.email:
            return f"serviceAccount:{self.email}"
        return '"user:$(gcloud config get account)"'

    def ask(self, service: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a service answers to a GET, or with ``body`` to a POST.

        Raises:
            GoogleAPICallError: it refuses.
            RequestException: it cannot be reached, or not in time.
            GarbageError: its answer is no JSON object.
        """
        answer = self._session().request(
            "GET" if body is None else "POST",
            self._endpoint(service) + path,
            json=body,
            timeout=TIMEOUT,
            allow_redirects=False,
        )
        where = answer.url.partition("?")[0]
        if not answer.ok:
            try:
                refused = api.from_http_response(answer)
            except (AttributeError, TypeError):  # JSON, but not a refusal of Google's
                refused = GarbageError(f"{where}: {answer.text[:60]!r}")
            raise refused
        try:
            content = answer.json()
        except requests.exceptions.JSONDecodeError:
            content = None
        if not isinstance(content, dict):
            raise GarbageError(f"{where}: {answer.text[:60]!r}")
        return content

    def pages(self, service: str, path: str) -> Iterator[dict[str, Any]]:
        """The pages of a list; raises as `ask` does."""
        token = ""
        for _ in range(_MOST_PAGES):
            page = self.ask(service, f"{path}&pageToken={token}" if token else path)
            yield page
            token = str(page.get("nextPageToken") or "")
            if not token:
                return

    def bucket(self, name: str, project: str) -> storage.Bucket:
        """A bucket, about which nothing was asked yet."""
        client = storage.Client(project, self.credentials, _http=self._session())
        return client.bucket(name)

    def _session(self) -> AuthorizedSession:
        # One a request: they are used by several threads
        return AuthorizedSession(self.credentials, refresh_timeout=TIMEOUT[1])

    def _endpoint(self, service: str) -> str:
        other = os.environ.get(f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}")
        if other:
            return f"{other.rstrip('/')}/"
        universe = getattr(self.credentials, "universe_domain", "") or "googleapis.com"
        return f"https://{service}.{universe}/{_PATHS.get(service, '')}"


def caller(project: str) -> Account:
    """Who runs the command.

    Args:
        project: what the requests of a user's account are counted to, where its credentials name
            no project; several services refuse them without one.

    Raises:
        GoogleAuthError: there are no credentials, or they are worth nothing any more.
    """
    credentials, _ = google.auth.default(scopes=[SCOPE])
    if isinstance(credentials, Credentials) and not credentials.quota_project_id:
        credentials = credentials.with_quota_project(project)

    def request(*args: Any, **options: Any) -> Any:
        return Request()(*args, **(options | {"timeout": TIMEOUT[1]}))

    credentials.refresh(request)
    return Account(credentials)
