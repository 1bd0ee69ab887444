"""Two jobs race for one output: one wins, the other ends with an error that names it.

pytest tests/faults/test_two_jobs.py                  3 races a kind
pytest tests/faults/test_two_jobs.py -m soak -s       25 races a kind
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

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
