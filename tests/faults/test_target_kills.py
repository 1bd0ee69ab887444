"""Making targets, killed at random instants: it goes on behind the last whole shard.

The short form runs with every test; ``make soak`` runs the long one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.proxy import FaultProxy
from trainer.storage.files import crc32c_of_bytes
from trainer.storage.places import open_location

WITH_SMALL_SHARDS = """
from trainer.runtime.signals import watch_signals
watch_signals()
from trainer import teacher_targets
from trainer.runtime.commands import run_command
from trainer.targets import making, shards
shards._SHARD_BYTES, making._PASS_TOKENS = 6 * 64 * 64, 6 * 64
raise SystemExit(run_command(teacher_targets.main))
"""
"""The command itself, with shards of 6 windows in place of 64 MiB."""


@pytest.fixture
def flags(teacher_dir: Path, tokens_dir: Path, tmp_path: Path) -> list[str]:
    settings = {
        "teacher_name": teacher_dir,
        "tokens_dir": tokens_dir,
        "local_workdir": tmp_path / "work",
        "target_temperatures": "1.0,1.5",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def start(output: str, flags: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WITH_SMALL_SHARDS, output, *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def finish(output: str, flags: list[str]) -> str:
    process = start(output, flags)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    return stderr


def contents(uri: str) -> dict[str, bytes]:
    location = open_location(uri)
    return {e.name: location.read_bytes(e.name, limit=1 << 24) for e in location.list()}


def check_whole(found: dict[str, bytes], expected: dict[str, bytes]) -> int:
    """Whatever has its description is what an unbroken command makes; returns how many."""
    described = [name for name in found if name.endswith(".json") and name != "targets.json"]
    for description in described:
        name = description.removesuffix(".json") + ".bin"
        assert found[name] == expected[name], name
        assert json.loads(found[description])["crc32c"] == crc32c_of_bytes(found[name])
    if "targets.json" in found:
        assert found.keys() == expected.keys()
    return len(described)


def kill_often(output: str, flags: list[str], unbroken: str, kills: int, seed: int) -> list[int]:
    """Kill the command after a random while of making, then let it end; how far each kill let it
    come."""
    finish(unbroken, flags)
    expected, draw, reached = contents(unbroken), random.Random(seed), list[int]()
    for _ in range(kills):
        process = start(output, flags)
        assert process.stderr is not None
        for line in process.stderr:
            if "are to be made here" in line:
                break
        time.sleep(draw.uniform(0.0, 2.5))
        process.kill()
        process.communicate()
        reached.append(check_whole(contents(output), expected))
    finish(output, flags)
    assert contents(output) == expected
    return reached


@pytest.mark.parametrize("place", [pytest.param("local", marks=pytest.mark.soak), "gs"])
def test_kills(
    place: str, flags: list[str], tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    output = f"{gcs_bucket}/targets" if place == "gs" else str(tmp_path / "out")
    reached = kill_often(output, flags, str(tmp_path / "unbroken"), 1, seed=3)
    assert reached == sorted(reached), "what was whole stays"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", ["local", "gs"])
def test_many_kills(
    place: str, flags: list[str], tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    output = f"{gcs_bucket}/targets" if place == "gs" else str(tmp_path / "out")
    reached = kill_often(output, flags, str(tmp_path / "unbroken"), 25, seed=11)
    print(f"\n{place}: {reached}")
    assert reached == sorted(reached)


def test_a_stop_is_one_line_and_the_same_command_goes_on(flags: list[str], tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    process = start(output, flags)
    assert process.stderr is not None
    for line in process.stderr:
        if "train-00002.bin is made" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(20) == 143
    assert "stopped by SIGTERM" in rest.splitlines()[-1]
    assert "Traceback" not in rest
    there = [name for name in contents(output) if name.endswith(".json")]
    assert len(there) >= 3
    told = finish(output, flags)
    assert f"{len(there)} of them are there already" in told
