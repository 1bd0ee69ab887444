"""The Google services that the checks before a submission ask, and the Hugging Face hub.

All is well there, but for the rules of a test: each gives some requests another answer.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.pipelines.loopback import Loopback

SERVICES = ("cloudresourcemanager", "serviceusage", "iam", "iamcredentials")
SERVICES += ("artifactregistry", "secretmanager", "compute")
Answer = tuple[int, Any]
Rules = Mapping[str, Answer | str]
"""By pattern of ``METHOD /path``: status and body, or ``hangs`` for no answer."""


def refusal(
    status: int, name: str, message: str, reason: str = "", service: str = ""
) -> tuple[int, dict[str, Any]]:
    """A refusal as Google's services write it."""
    error: dict[str, Any] = {"code": status, "status": name, "message": message}
    if reason:
        info = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}
        metadata = {"service": f"{service}.googleapis.com"}
        error["details"] = [info | {"domain": "googleapis.com", "metadata": metadata}]
    return status, {"error": error}


def disabled(service: str) -> tuple[int, dict[str, Any]]:
    said = f"{service} has not been used in project 12 before or it is disabled"
    return refusal(403, "PERMISSION_DENIED", said, "SERVICE_DISABLED", service)


def quota(limits: Mapping[str, int]) -> Answer:
    """A quota's limits by region; the one of the empty name is that of all others."""
    buckets = [
        ({"dimensions": {"region": region}} if region else {})
        | ({"effectiveLimit": str(limit)} if limit else {})
        for region, limit in limits.items()
    ]
    limit = {"unit": "1/{project}/{region}", "quotaBuckets": buckets}
    return 200, {"consumerQuotaLimits": [{"unit": "1/{project}"}, limit]}


def method_of(service: str, path: str) -> str:
    """How the services want to be asked, of which each has its way with policies."""
    posts = (":testIamPermissions", ":generateAccessToken", ":getAncestry")
    if service in ("iam", "cloudresourcemanager"):
        posts += (":getIamPolicy",)
    return "POST" if path.endswith(posts) else "GET"


class GoogleServices(Loopback):
    """Each below its own path; Vertex AI at the root."""

    def __init__(self, directory: Path, *, tls: bool = True) -> None:
        self.rules: Rules = {}
        self._closing = threading.Event()
        super().__init__(directory, tls=tls)

    def close(self) -> None:
        self._closing.set()
        super().close()

    def overrides(self) -> dict[str, str]:
        """The variables that lead the clients here."""
        named = {
            f"CLOUDSDK_API_ENDPOINT_OVERRIDES_{service.upper()}": f"{self.url}/{service}/"
            for service in SERVICES
        }
        return named | {
            "STORAGE_EMULATOR_HOST": self.url,
            "API_ENDPOINT": f"localhost:{self.port}",
            "API_TRANSPORT": "rest",
            "REQUESTS_CA_BUNDLE": str(self.bundle),
        }

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        for pattern, given in self.rules.items():
            if re.search(pattern, f"{method} {path}"):
                if given == "hangs":
                    self._closing.wait()
                    return 503, {}
                assert not isinstance(given, str)
                self.requests.append((method, path, body))
                return given
        parts = urlsplit(path)
        service, _, rest = parts.path.lstrip("/").partition("/")
        if service in SERVICES or service in ("storage", "api"):
            self.requests.append((method, path, body))
            if method != method_of(service, parts.path):
                return 404, "<html>Error 404 (Not Found)</html>"
            return 200, self._fine(service, rest, parse_qs(parts.query), body)
        if method == "GET" and re.search(r"/pipelineJobs\?", path):
            self.requests.append((method, path, body))
            return 200, {}
        return super().answer(method, path, body)

    def _fine(self, service: str, path: str, query: dict[str, list[str]], body: Any) -> Any:
        if path.endswith(":testIamPermissions"):
            return {"permissions": body["permissions"]}
        if path.endswith("/iam/testPermissions"):
            return {"permissions": query["permissions"]}
        if path.endswith((":getIamPolicy", "/iam")):
            return {"bindings": []}
        if path.endswith(":getAncestry"):
            return {"ancestor": [{"resourceId": {"type": "project", "id": "p"}}]}
        if path.endswith("services:batchGet"):
            return {"services": [{"name": n, "state": "ENABLED"} for n in query["names"]]}
        if "consumerQuotaMetrics" in path:
            return quota({"": 0, "europe-west4": 8})[1]
        if service == "compute":
            kind = path.rpartition("/")[2]
            here = {kind: [{"name": "x"}]}
            elsewhere = {"warning": {"code": "NO_RESULTS_ON_PAGE"}}
            return {"items": {"zones/europe-west4-a": here, "zones/us-west1-b": elsewhere}}
        return {
            "cloudresourcemanager": {"projectNumber": "12", "lifecycleState": "ACTIVE"},
            "iamcredentials": {"accessToken": "of-the-stages"},
            "storage": {"name": "x", "location": "EUROPE-WEST4", "projectNumber": "12"}
            | {"size": str(3 * 2**20)},
            "secretmanager": {"state": "ENABLED"},
            "api": {"id": "x", "gated": False, "private": False},
        }.get(service, {"name": path})
