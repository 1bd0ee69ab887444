"""Two jobs race for one output: one wins, the other ends with an error that names it.

pytest tests/faults/test_two_jobs.py                  3 races a kind, 1 start of two whole jobs
pytest tests/faults/test_two_jobs.py -m soak -s       25 races a kind, 20 starts of whole jobs
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoints.names import is_checkpoint_name, sidecar_name
from trainer.checkpoints.snapshots import read_from, read_sidecars, read_verified
from trainer.storage.places import open_location

JOB = """
    import sys
    from pathlib import Path
    from trainer.runtime.errors import StorageError
    from trainer.storage.base import TransferPolicy
    from tests.faults.pairs import Pairs
    from trainer.storage.places import open_location
    from trainer.storage.uploads import Uploader
    mark, uri, workdir = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    location = open_location(uri, TransferPolicy(chunk_bytes=256 * 1024, first_delay=0.01))
    location.list()
    workdir.mkdir()
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        for step in range(5):
            uploads = Uploader(location)
            content = (mark * 300_000).encode()
            names = ["best.pt"] if step % 2 == 0 else [f"{mark}.pt", "best.pt"]
            Pairs(uploads, location, workdir).submit(content, *names, step=step)
            uploads.drain()
            uploads.close()
            print("wrote", flush=True)
    except StorageError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_status)
    """


def race(uri: str, workdir: Path) -> None:
    workdir.mkdir()
    jobs = {
        mark: subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(JOB), mark, uri, str(workdir / mark)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for mark in "ab"
    }
    for job in jobs.values():
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
    for job in jobs.values():
        assert job.stdin is not None
        job.stdin.write("go\n")
        job.stdin.flush()
    said = {mark: job.communicate(timeout=60)[0].splitlines() for mark, job in jobs.items()}
    winners = [mark for mark, job in jobs.items() if job.returncode == 0]
    assert len(winners) == 1, said
    (winner,) = winners
    loser = "b" if winner == "a" else "a"
    assert jobs[loser].returncode == 1
    last = said[loser][-1]
    assert last.startswith(f"StorageConflictError: {uri}/best.pt")
    assert f"process {jobs[winner].pid}" in last
    # What is there is the winner's last, untouched
    reader = open_location(uri)
    assert reader.read_bytes("best.pt", limit=10**6) == winner.encode() * 300_000
    sidecar = json.loads(reader.read_bytes("best.pt.meta.json", limit=1000))
    assert sidecar["step"] == 4


@pytest.fixture(params=["local", "gs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("gcs_bucket")


def test_one_wins_and_the_other_says_so(place: str, tmp_path: Path) -> None:
    for number in range(3):
        race(f"{place}/run-{number}", tmp_path / f"work-{number}")


@pytest.mark.soak
def test_many_races(place: str, tmp_path: Path) -> None:
    for number in range(25):
        race(f"{place}/run-{number}", tmp_path / f"work-{number}")
    print("\n25 races, 25 times one winner")


# Whole jobs


def start_two(settings: dict[str, Any], uri: str, workdir: Path, delay: float) -> str:
    """Start one job twice on an empty output; returns when the loser learnt that it is one.

    Args:
        settings: of the job.
        uri: its output.
        workdir: of the two jobs.
        delay: seconds from the first start to the second.
    """
    processes = []
    for name in "ab":
        job = settings | {"output_gcs_uri": uri, "local_workdir": str(workdir / name)}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "trainer.entrypoint"]
                + [f"--{name}={value}" for name, value in job.items()],
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )
        )
        time.sleep(delay if name == "a" else 0)
    logs = [process.communicate(timeout=240)[1] for process in processes]
    statuses = [process.returncode for process in processes]
    said = [[json.loads(line)["message"] for line in text.splitlines()] for text in logs]
    last = [messages[-1] for messages in said]
    assert sorted(statuses) == [0, 1] or statuses == [0, 0], last
    check_whole(uri, workdir)
    assert read_from(f"{uri}/final.pt", workdir).step == settings["train_steps"]
    if statuses == [0, 0]:  # the second came when the first had ended
        assert any(message.startswith("nothing to do") for message in said[1]), last
        return "after the end"
    winner = statuses.index(0)
    assert f"process {processes[winner].pid}" in last[1 - winner]
    assert "was written by another job" in last[1 - winner]
    trained = any(message.startswith("step ") for message in said[1 - winner])
    return f"{'later' if trained else 'at once'}, {'ab'[1 - winner]} lost"


def check_whole(uri: str, workdir: Path) -> None:
    location = open_location(uri)
    names = {entry.name for entry in location.list()}
    assert all(sidecar_name(name) in names for name in names if is_checkpoint_name(name))
    sidecars = read_sidecars(location)
    assert len(sidecars) == sum(map(is_checkpoint_name, names))
    for sidecar in sidecars:
        read_verified(location, sidecar, workdir)


@pytest.fixture
def job(settings: dict[str, Any]) -> dict[str, Any]:
    """So short that the second start comes at any moment of the first one's snapshots."""
    often = {"train_steps": 40, "save_every": 2, "eval_every": 4, "eval_max_tokens": 128}
    return settings | often | {"log_interval": 2}


def test_of_two_jobs_that_start_at_once_one_goes_on(
    gcs_bucket: str, job: dict[str, Any], tmp_path: Path
) -> None:
    start_two(job | {"train_steps": 20}, f"{gcs_bucket}/run", tmp_path / "jobs", delay=0.0)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_starts(place: str, job: dict[str, Any], tmp_path: Path) -> None:
    draw = random.Random(3)
    outcomes: Counter[str] = Counter()
    for number in range(20):
        delay = draw.choice((0.0, draw.uniform(0.0, 6.0)))
        outcome = start_two(job, f"{place}/run-{number}", tmp_path / f"jobs-{number}", delay)
        outcomes[outcome] += 1
    print(f"\n20 starts of two jobs, 20 times one went on: {dict(outcomes)}")
