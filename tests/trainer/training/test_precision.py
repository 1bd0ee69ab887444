"""What ``--compile`` says and needs on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.settings.config import TrainConfig
from trainer.training.precision import choose_precision

Settings = dict[str, object]


def train(settings: Settings, **environ: str) -> tuple[int, list[dict[str, object]]]:
    """Exit status and messages of a training that compiles; every line of it is one."""
    flags = [f"--{name}={value}" for name, value in (settings | {"compile": "on"}).items()]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.entrypoint", *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environ,
        timeout=300,
    )
    # torch's compiler may warn of the machine in lines of its own
    ours = [line for line in done.stderr.splitlines() if line.startswith("{")]
    assert "Traceback" not in done.stderr
    return done.returncode, [json.loads(line) for line in ours]


def test_a_machine_without_a_compiler_is_one_line(settings: Settings, tmp_path: Path) -> None:
    status, lines = train(settings, PATH=str(tmp_path), CXX="")
    assert status == 2
    assert "--compile=on: on a CPU it needs a C++ compiler, and 'g++' is not here" in str(lines[-1])
    assert not list((tmp_path / "work").glob("*.pt"))


def test_a_compiler_that_fails_is_one_line(settings: Settings, tmp_path: Path) -> None:
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\necho no compiler >&2\nexit 1\n")
    compiler.chmod(0o755)
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    status, lines = train(settings, CXX=str(compiler), **cache)
    assert status == 1
    assert "torch.compile failed: " in str(lines[-1])
    assert "give --compile=off" in str(lines[-1])


def test_what_auto_chose_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trainer")
    precision = choose_precision(TrainConfig(), torch.device("cpu"))
    assert not precision.compiles(TrainConfig())
    assert "--compile=auto: off, on a CPU" in caplog.text
