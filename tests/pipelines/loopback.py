"""Vertex AI's and Kubeflow Pipelines' HTTP interfaces, as much of them as submitting needs.

The clients are the real ones; only the far end is here.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # the checks before a submission all connect at once

    def handle_error(self, *_: object) -> None:
        """Nothing: a client that waits no longer has closed its connection."""


class Loopback:
    """A server on 127.0.0.1 that records requests and answers as told."""

    def __init__(self, directory: Path, *, tls: bool) -> None:
        self.requests: list[tuple[str, str, Any]] = []
        self.jobs: dict[str, dict[str, Any]] = {}
        self.refusal: tuple[int, str, str] | None = None
        """HTTP status, gRPC status and message for every interface call."""
        self.page: tuple[int, dict[str, str], str] | None = None
        """Status, headers and text for every request: what is no interface answers."""
        self.headers: dict[str, str] = {}
        """More of them for each answer."""
        self.outages = 0
        """How many of the next looks at a run end as 503."""
        self.task_error: dict[str, Any] = {}
        """What Vertex AI says of a task that failed."""
        self.run_state = "SUCCEEDED"
        """Of runs of Kubeflow Pipelines."""
        self.multi_user = False
        """Whether Kubeflow Pipelines keeps its users apart by namespaces."""
        self.looks = 0
        self.models: dict[str, list[dict[str, Any]]] = {}
        """By full name: the versions of models in the registry, the newest last."""
        self.contexts: dict[str, dict[str, Any]] = {}
        """Of Vertex AI's metadata, by name; an experiment is one."""
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.port = self._server.server_address[1]
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://localhost:{self.port}"
        self.bundle = directory / "bundle.pem"
        if tls:
            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(self.bundle))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            authority.issue_cert("localhost").configure_cert(context)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def service_account(self, path: Path) -> Path:
        """A service-account file whose tokens come from this server."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        content = {
            "type": "service_account",
            "project_id": "p",
            "private_key_id": "1",
            "private_key": pem.decode(),
            "client_email": "robot@p.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"{self.url}/token",
        }
        path.write_text(json.dumps(content))
        return path

    def answer(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        """What a request gets."""
        if path == "/token":
            return 200, {"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}
        self.requests.append((method, path, body))
        if self.refusal:
            status, name, message = self.refusal
            return status, {"error": {"code": status, "status": name, "message": message}}
        if path.startswith("/apis/"):
            return self._kubeflow(method, path, body)
        return self._vertex(method, path, body)

    def _vertex(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        created = re.fullmatch(r"/v1(?:beta1)?/(projects/.*/pipelineJobs)\?(.*)", path)
        if method == "POST" and created:
            job_id = re.search(r"pipelineJobId=([^&]+)", created[2])
            name = f"{created[1]}/{job_id[1] if job_id else 'job'}"
            self.jobs[name] = dict(body) | {"name": name, "state": "PIPELINE_STATE_PENDING"}
            return 200, self.jobs[name]
        name = re.sub(r"^/v1(beta1)?/|\?.*$", "", path)
        if method == "POST" and name.endswith("/models:upload"):
            return 200, self._upload(name.removesuffix(":upload"), body)
        model = unquote(name).partition("@")[0]
        if method == "GET" and model in self.models:
            return 200, self.models[model][-1]
        if "/metadataStores/" in name:
            return self._metadata(method, name, path, body)
        if self._is_out():
            return 503, {"error": {"code": 503, "status": "UNAVAILABLE", "message": "restarting"}}
        if method == "GET" and name in self.jobs:
            self.looks += 1
            return 200, self._progressed(self.jobs[name])
        return 404, {"error": {"code": 404, "status": "NOT_FOUND", "message": f"{name} is absent"}}

    def _upload(self, parent: str, body: dict[str, Any]) -> dict[str, Any]:
        """The finished operation that has put a model, or its next version, into the registry."""
        name = body.get("parentModel") or f"{parent}/{body['modelId']}"
        versions = self.models.setdefault(name, [])
        number = str(len(versions) + 1)
        versions.append(body["model"] | {"name": name, "versionId": number})
        kind = "type.googleapis.com/google.cloud.aiplatform.v1.UploadModelResponse"
        done = {"@type": kind, "model": name, "modelVersionId": number}
        return {"name": f"{name}/operations/{number}", "done": True, "response": done}

    def _metadata(self, method: str, name: str, path: str, body: Any) -> tuple[int, Any]:
        """The store, which is there, and the contexts in it."""
        if name.endswith(":addContextChildren"):
            self.contexts[name.partition(":")[0]]["children"] = body["childContexts"]
            return 200, {}
        created = re.search(r"contextId=([^&]+)", path)
        if method == "POST" and created:
            name = f"{name}/{created[1]}"
            self.contexts[name] = {"name": name, **body}
        if method == "GET" and re.search(r"/metadataStores/default$", name):
            return 200, {"name": name}
        if name in self.contexts:
            return 200, {k: v for k, v in self.contexts[name].items() if k != "children"}
        return 404, {"error": {"code": 404, "status": "NOT_FOUND", "message": f"{name} is absent"}}

    def _is_out(self) -> bool:
        self.outages -= 1
        return self.outages >= 0

    def _progressed(self, job: dict[str, Any]) -> dict[str, Any]:
        """The second task runs at the first looks; then the run ends as the job says."""
        if "jobDetail" in job:
            return job
        ended = self.looks > 3
        last = job["labels"].get("ends", "succeeded").upper()
        loop = "SUCCEEDED" if ended else "RUNNING"
        # Vertex AI lists the run itself among its tasks, and a loop beside its rounds
        tasks = [
            (job["name"].rpartition("/")[2], "0", last if ended else "RUNNING"),
            ("prepare", "1", "SUCCEEDED"),
            ("teacher-online", "1", "NOT_TRIGGERED"),
            ("shares", "1", loop),
            ("teacher-targets", "4", loop),
            ("teacher-targets", "4", "SUCCEEDED"),
            ("anneal", "1", last if ended else "RUNNING"),
        ]
        details: list[dict[str, Any]] = [
            {"taskId": str(number), "parentTaskId": parent, "taskName": name, "state": state}
            for number, (name, parent, state) in enumerate(tasks, start=1)
        ]
        if details[-1]["state"] == "FAILED":
            details[-1]["error"] = self.task_error
        state = f"PIPELINE_STATE_{last}" if ended else "PIPELINE_STATE_RUNNING"
        store, _, run_id = job["name"].partition("/pipelineJobs/")
        # Vertex AI makes the run's context a while after the run
        context = {"name": f"{store}/metadataStores/default/contexts/{run_id}"}
        around = {"pipelineRunContext": context} if self.looks > 1 else {}
        return job | {"state": state, "jobDetail": {"taskDetails": details, **around}}

    def _kubeflow(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if path.startswith("/apis/v2beta1/healthz"):
            return 200, {"multi_user": self.multi_user}
        if path.startswith("/apis/v2beta1/experiments"):
            named = (body or {}).get("namespace") or re.search(r"[?&]namespace=[^&]", path)
            if bool(named) != self.multi_user:
                return 400, {"error": "a namespace is for several users, and needed there"}
            experiment = {"experiment_id": "e1", "display_name": "liquid-annealing"}
            return 200, experiment if method == "POST" else {"experiments": [experiment]}
        if path.startswith("/apis/v2beta1/recurringruns"):
            return 200, {"recurring_run_id": "s1", "display_name": body["display_name"]}
        if path.startswith("/apis/v2beta1/runs"):
            if method == "GET" and self._is_out():
                return 503, {"error": "restarting"}
            return 200, {"run_id": "r1", "display_name": "run", "state": self.run_state}
        return 404, {"error": f"{path} is not served"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def _serve(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                try:
                    body = json.loads(raw) if raw else None
                except ValueError:
                    body = raw.decode(errors="replace")
                if loopback.page:
                    status, headers, text = loopback.page
                else:
                    status, answer = loopback.answer(self.command, self.path, body)
                    headers = {"Content-Type": "application/json"} | loopback.headers
                    text = answer if isinstance(answer, str) else json.dumps(answer)
                data = text.encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = _serve

        return Handler
