"""What `make` is given on its command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.make_variables import COMMANDS, OTHERS, wrong_variable

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("goals", "given", "message"),
    [
        (
            "submit-pipeline",
            "PROJECT ANEAL_REPLICAS",
            "no command reads ANEAL_REPLICAS; did you me",
        ),
        ("submit-pipeline", "PARAM", "no command reads PARAM; did you mean PARAMS?"),
        ("submit-kfp", "WANDB_MODE", "no command reads WANDB_MODE; docs/pipeline.md lists what"),
        ("run-local", "STAGE", "make run-local does not read STAGE; it is for rerun, so leave it"),
        ("compile", "WAIT", "it is for submit-pipeline, submit-kfp, rerun and search, so leave"),
        ("clean", "REGION", "make clean does not read REGION; it is for run-local, compile, bui"),
        ("", "JOBS", "make help does not read JOBS; it is for test, so leave it out"),
        ("rerun", "STAGE RUN PROJECT WAIT LOG_FORMAT", ""),
        # One list of settings for every command of the pipeline
        ("run-local", "REGION ANNEAL_REPLICAS RUN PARAMS", ""),
        ("rerun", "ANNEAL_SPOT", "ANNEAL_SPOT is of an earlier release; give ANNEAL_SCHEDULING=sp"),
        (
            "submit-pipeline",
            "ANEAL_SPOT",
            "no command reads ANEAL_SPOT; ANNEAL_SPOT is of an earlier release; give ANNEAL_SCHED",
        ),
        ("lint test", "JOBS PYTHON", ""),
    ],
)
def test_only_what_the_command_reads(goals: str, given: str, message: str) -> None:
    found = wrong_variable(goals.split(), given.split())
    assert found.startswith(message) if message.startswith("no") else message in found
    assert bool(found) == bool(message)


def test_every_command_of_the_makefile_is_known() -> None:
    text = (ROOT / "Makefile").read_text()
    assert set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE)) == {*COMMANDS, *OTHERS}


@pytest.mark.parametrize(
    ("words", "status", "output"),
    [
        (["submit-pipeline", "PARAM=seed=7"], 2, "no command reads PARAM; did you mean PARAMS?"),
        (["clean", "ALLL=1"], 2, "no command reads ALLL; did you mean ALL?"),
        (["clean", "ALL=1", "PYTHON=x"], 0, "rm -rf work"),
        (["help"], 0, "grep"),
    ],
)
def test_make_stops_before_anything_is_set_up(
    words: list[str], status: int, output: str, tmp_path: Path
) -> None:
    """Without a virtual environment: in a directory that has none."""
    for name in ("Makefile", "pipelines", "trainer_image", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = [] if "PYTHON=x" in words else [f"PYTHON={sys.executable}"]
    done = subprocess.run(
        ["make", "-n", *python, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "ANEAL_REPLICAS": "1"},
    )
    assert done.returncode == status, done.stderr
    assert output in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
