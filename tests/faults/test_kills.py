"""A job killed at random instants goes on where it was, and nothing under a final name is broken.

The short form runs with every test; ``make soak`` runs the long one.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.proxy import FaultProxy
from tests.trainer.metrics.records import lasting_lines
from trainer import pick_best
from trainer.checkpoints.names import is_checkpoint_name, sidecar_name
from trainer.checkpoints.snapshots import (
    read_from,
    read_sidecars,
    read_verified,
    without_sidecar,
)
from trainer.metrics.reading import read_run
from trainer.storage.places import open_location

Settings = dict[str, Any]


@pytest.fixture
def job(settings: Settings) -> Settings:
    """Half of its time goes into checkpoints, so that kills land in their writing."""
    return settings | {
        "d_model": 64,
        "micro_batch": 2,
        "train_steps": 60,
        "save_every": 2,
        "eval_every": 4,
        "eval_max_tokens": 128,
        "log_interval": 20,
        "alpha_schedule": "0:0.7,15:0.5,45:0.2",
    }


def start(job: Settings) -> subprocess.Popen[str]:
    flags = [f"--{name}={value}" for name, value in job.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "trainer.entrypoint", *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


def wait_for(process: subprocess.Popen[str], text: str) -> bool:
    """Read the log up to a line; False if the process ended before."""
    assert process.stderr is not None
    return any(text in line for line in process.stderr)


def finish(job: Settings) -> str:
    process = start(job)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr[-3000:]
    return stderr


def check_whole(uri: str, workdir: Path) -> int:
    """Every file with a final name is whole, and so is the one picked; returns how many."""
    location = open_location(uri)
    names = {entry.name for entry in location.list()}
    sidecars = read_sidecars(location)
    parsed = {sidecar.name for sidecar in sidecars}
    described = {name for name in names if sidecar_name(name) in names}
    assert described == parsed, "every sidecar can be read"
    for sidecar in sidecars:
        checkpoint = read_verified(location, sidecar, workdir)
        assert checkpoint.meta["step"] == sidecar.step
    # Weights whose sidecar was not reached are whole too: they came by rename, or in one request
    for name in names - described:
        if is_checkpoint_name(name):
            read_from(location.child(name), workdir)
    if sidecars:
        # A snapshot is never there before the lines up to its step
        last = max(sidecar.step for sidecar in sidecars)
        recorded = [line["step"] for line in read_run(uri).updates]
        assert [step for step in recorded if step <= last] == list(range(20, last + 1, 20))
    if any(sidecar.metrics for sidecar in sidecars):
        picked = pick_best.run([uri], "val_loss_student")
        assert read_from(picked.uri, workdir).step == picked.step
    return len(sidecars)


def assert_equal_ends(first: str, second: str, workdir: Path) -> None:
    ours, theirs = (read_from(f"{uri}/final.pt", workdir) for uri in (first, second))
    assert ours.step == theirs.step
    for name, tensor in ours.weights.items():
        assert torch.equal(tensor, theirs.weights[name]), name
    moments, expected = ours.optimizer_by_name(), theirs.optimizer_by_name()
    for name, state in moments.items():
        assert torch.equal(state["exp_avg_sq"], expected[name]["exp_avg_sq"]), name
    assert ours.meta["metrics"] == theirs.meta["metrics"]
    assert lasting_lines(first) == lasting_lines(second)
    best = [read_from(f"{uri}/best.pt", workdir) for uri in (first, second)]
    assert best[0].step == best[1].step


def kill_often(job: Settings, uri: str, kills: int, tmp_path: Path, seed: int) -> dict[str, int]:
    """Kill the job again and again, each time after some files and a random while."""
    draw = random.Random(seed)
    (tmp_path / "scratch").mkdir(exist_ok=True)
    counts = {"kills": 0, "checked": 0, "runs": 0}
    unbroken = job | {"local_workdir": str(tmp_path / "unbroken")}
    finish(unbroken)
    while counts["kills"] < kills:
        output = f"{uri}/run-{counts['runs']}"
        killed = job | {"output_gcs_uri": output, "local_workdir": str(tmp_path / "work")}
        while counts["kills"] < kills:
            process = start(killed)
            # By what the log tells, so that a slow machine is killed as far on as a fast one
            written = draw.randrange(12)
            seen = ["training from step", *["uploaded "] * written]
            if not all(wait_for(process, text) for text in seen):
                process.communicate()
                break
            time.sleep(draw.uniform(0.0, 0.2))
            process.kill()
            process.communicate()
            counts["kills"] += 1
            counts["checked"] += check_whole(output, tmp_path / "scratch")
        finish(killed)
        check_whole(output, tmp_path / "scratch")
        names = {entry.name for entry in open_location(output).list()}
        assert not without_sidecar(names), "what a kill left was completed or removed"
        assert_equal_ends(output, str(tmp_path / "unbroken"), tmp_path / "scratch")
        counts["runs"] += 1
    return counts


@pytest.mark.parametrize("place", [pytest.param("local", marks=pytest.mark.soak), "gs"])
def test_kills(
    place: str, job: Settings, tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    uri = gcs_bucket if place == "gs" else str(tmp_path / "out")
    kills = 1 if place == "gs" else 3
    counts = kill_often(job, uri, kills, tmp_path, seed=1)
    assert counts["kills"] == kills


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("place", ["local", "gs"])
def test_many_kills(
    place: str, job: Settings, tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    uri = gcs_bucket if place == "gs" else str(tmp_path / "out")
    counts = kill_often(job, uri, 25, tmp_path, seed=7)
    print(f"\n{place}: {counts}")
    assert counts["kills"] == 25


def test_sigterm_saves_and_the_same_command_goes_on(
    job: Settings, tmp_path: Path, gcs_bucket: str
) -> None:
    stopped = job | {"output_gcs_uri": f"{gcs_bucket}/run", "save_every": 1000, "eval_every": 1000}
    unbroken = stopped | {"output_gcs_uri": str(tmp_path / "plain")}
    finish(unbroken | {"local_workdir": str(tmp_path / "w2")})
    process = start(stopped)
    assert wait_for(process, "step 20/60")
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 143, stderr[-2000:]
    last = json.loads(stderr.splitlines()[-1])
    assert last["severity"] == "ERROR"
    assert "stopped by SIGTERM at step" in last["message"]
    (saved,) = read_sidecars(open_location(f"{gcs_bucket}/run"))
    assert 20 <= saved.step < 60
    stderr = finish(stopped)
    assert f"at step {saved.step}" in stderr
    (tmp_path / "scratch").mkdir()
    assert_equal_ends(f"{gcs_bucket}/run", str(tmp_path / "plain"), tmp_path / "scratch")


@pytest.mark.soak
@pytest.mark.parametrize("ended", [False, True], ids=["half way", "at its end"])
def test_a_run_whose_sidecars_are_all_gone_loses_nothing(
    job: Settings, tmp_path: Path, gcs_bucket: str, ended: bool
) -> None:
    uri = f"{gcs_bucket}/run"
    job |= {"train_steps": 40}
    lost = job | {"output_gcs_uri": uri, "local_workdir": str(tmp_path / "work")}
    process = start(lost)
    if ended:
        process.communicate(timeout=240)
    else:
        assert wait_for(process, "step 20/40")
        process.kill()
        process.communicate()
    location = open_location(uri)
    before = {sidecar_name(sidecar.name): sidecar.step for sidecar in read_sidecars(location)}
    contents = {name: location.read_bytes(name, limit=1 << 20) for name in before}
    for name in before:
        location.delete(name)
    said = finish(lost)
    step = max(before.values())
    expected = "nothing to do: " if ended else f"going on from own snapshot {uri}/"
    (line,) = [line for line in said.splitlines() if expected in line]
    reached = re.search(r"at step (\d+)", line)
    assert reached is not None
    assert int(reached[1]) >= step  # weights may have come before their sidecar
    again = open_location(uri)
    (tmp_path / "scratch").mkdir()
    check_whole(uri, tmp_path / "scratch")
    if ended:
        assert contents == {name: again.read_bytes(name, limit=1 << 20) for name in before}
        return
    finish(job | {"local_workdir": str(tmp_path / "unbroken")})
    assert_equal_ends(uri, str(tmp_path / "unbroken"), tmp_path / "scratch")
