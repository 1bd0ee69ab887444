"""A token planted in each of the five sources is found in nothing that a run leaves or prints."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c
import psutil
import pytest
from google.auth.credentials import AnonymousCredentials
from google.cloud import secretmanager
from google.cloud.secretmanager_v1.services.secret_manager_service.transports import (
    SecretManagerServiceRestTransport,
)

from trainer.runtime.errors import LiquidError
from trainer.settings.config import TrainConfig
from trainer.settings.hf_token import find_hf_token
from trainer.storage.places import open_location

TOKEN = "hf_PlantedTokenThatMustNotLeak0123456789"


class _Secrets(BaseHTTPRequestHandler):
    """The one request of Secret Manager's REST interface that is needed."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        status, body = 404, {"error": {"code": 404, "message": "Secret not found", "status": "X"}}
        if self.path.startswith("/v1/projects/p/secrets/hf/versions/latest:access"):
            data = TOKEN.encode()
            checksum = int.from_bytes(google_crc32c.Checksum(data).digest(), "big")
            payload = {"data": b64encode(data).decode(), "dataCrc32c": str(checksum)}
            status, body = 200, {"name": "projects/p/secrets/hf/versions/1", "payload": payload}
        answer = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


@pytest.fixture
def secret_manager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The real client, led to a loopback server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Secrets)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    real = secretmanager.SecretManagerServiceClient

    def client() -> Any:
        transport = SecretManagerServiceRestTransport(
            host=f"127.0.0.1:{server.server_address[1]}",
            url_scheme="http",
            credentials=AnonymousCredentials(),
        )
        return real(transport=transport)

    monkeypatch.setattr(secretmanager, "SecretManagerServiceClient", client)
    yield
    server.shutdown()
    server.server_close()


def test_secret_manager_gives_the_token(secret_manager: None) -> None:
    for name in ("projects/p/secrets/hf", "projects/p/secrets/hf/versions/latest"):
        assert find_hf_token(TrainConfig(hf_secret_name=name), {}) == TOKEN


def test_a_secret_that_is_not_there_is_one_line(secret_manager: None) -> None:
    with pytest.raises(LiquidError, match="'projects/p/secrets/no' cannot be read") as caught:
        find_hf_token(TrainConfig(hf_secret_name="projects/p/secrets/no"), {})
    assert "\n" not in str(caught.value)


def plant(source: str, tmp_path: Path, bucket: str) -> tuple[dict[str, str], dict[str, str]]:
    """Flags and environment that give the token through one source."""
    if source == "environment":
        return {}, {"HF_TOKEN": TOKEN}
    if source == "value":
        return {"hf_token_value": TOKEN}, {}
    if source == "file":
        (tmp_path / "token").write_text(TOKEN)
        return {"hf_token_file": str(tmp_path / "token")}, {}
    open_location(f"{bucket}/secret").put_bytes(TOKEN.encode(), "token")
    return {"hf_token_gcs_uri": f"{bucket}/secret/token"}, {}


@pytest.mark.parametrize("source", ["environment", "value", "file", "object"])
def test_nothing_a_run_leaves_or_prints_holds_the_token(
    source: str, settings: dict[str, Any], tmp_path: Path, gcs_bucket: str
) -> None:
    """A run that succeeds, then one that fails while it has the token in hand."""
    flags, environment = plant(source, tmp_path, gcs_bucket)
    output = tmp_path / "out"
    for change, status in (({}, 0), ({"teacher_name": "no-such-owner/model"}, 1)):
        merged = settings | flags | {"output_gcs_uri": str(output / str(status))} | change
        argv = [f"--{name}={value}" for name, value in merged.items()]
        done = subprocess.run(
            [sys.executable, "-m", "trainer.entrypoint", *argv],
            capture_output=True,
            text=True,
            env=os.environ | environment | {"HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == status, done.stderr[-2000:]
        assert TOKEN not in done.stdout + done.stderr
        assert "Hugging Face token taken from" in done.stderr
    files = [path for place in (output, tmp_path / "work") for path in place.rglob("*")]
    contents = [path.read_bytes() for path in files if path.is_file()]
    assert len(contents) > 4
    assert not any(TOKEN.encode() in content for content in contents)


def test_no_process_has_the_token_in_its_command_line(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """But for those that the user gave it to: the launchers of two machines."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        pools = {"workerpool0": [f"127.0.0.1:{free.getsockname()[1]}"], "workerpool1": ["x:1"]}
    del settings["global_batch"]
    flags = settings | {"hf_token_value": TOKEN, "train_steps": 100_000, "log_interval": 1}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", "trainer.entrypoint", *argv],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            | {"CLUSTER_SPEC": json.dumps({"cluster": pools, "task": {"type": kind, "index": 0}})},
        )
        for kind in pools
    ]
    try:
        stderr = machines[0].stderr
        assert stderr is not None
        log = "".join(itertools.takewhile(lambda line: '"step 1/100000' not in line, stderr))
        workers = [
            child for machine in machines for child in psutil.Process(machine.pid).children()
        ]
        assert len(workers) == 2, log
        assert not any(TOKEN in " ".join(worker.cmdline()) for worker in workers)
        assert all(worker.environ()["HF_TOKEN"] == TOKEN for worker in workers)
        assert "Hugging Face token taken from HF_TOKEN" in log
    finally:
        for machine in machines:
            machine.send_signal(signal.SIGTERM)
        ends = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [143, 143], ends
    assert TOKEN not in log + "".join(ends)
