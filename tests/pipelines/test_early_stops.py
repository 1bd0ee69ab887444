"""SIGTERM and SIGINT end the commands of this package from their beginning on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interrupts import with_interrupts

SLOW = """
import sys, time

class SlowImports:
    def find_spec(self, name, path=None, target=None):
        if name in ("kfp", "pipelines.settings", "pipelines.anneal"):
            print("at work", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, SlowImports())
"""
"""What Python imports at its start, in a directory of its own: then the imports take a minute."""


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [(signal.SIGTERM, 143, "stopped by SIGTERM"), (signal.SIGINT, 130, "interrupted")],
)
@pytest.mark.parametrize(
    "module", ["submit", "rerun", "compile", "build_image", "describe", "local"]
)
def test_a_stop_while_it_imports(
    module: str, number: signal.Signals, status: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    root = Path(__file__).parents[2]
    paths = (tmp_path, root, root / "trainer_image")
    process = subprocess.Popen(
        [sys.executable, "-m", f"pipelines.{module}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        preexec_fn=with_interrupts,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    (line,) = errors.splitlines()
    assert (process.returncode, json.loads(line)["message"]) == (status, message)
