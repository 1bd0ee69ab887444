"""The teacher's targets in the kfp local runner: by several workers, one killed, and kept."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.local import run_pipeline
from pipelines.parameters import parameter_defaults
from pipelines.stages import STAGES
from trainer.runtime.errors import LiquidError

pytestmark = pytest.mark.timeout(900)

SMALL_SHARDS = "from trainer.targets import shards\nshards._SHARD_BYTES = 1 << 19\n"
"""Where the tasks' processes start: a small stream has a dozen shards too."""
WITHOUT_TRAINING = {"anneal_alpha_schedule": "0:7"}
"""Annealing refuses it, so that a run ends once the targets are made."""


@pytest.fixture(scope="module", autouse=True)
def _small_shards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    directory = tmp_path_factory.mktemp("start")
    (directory / "sitecustomize.py").write_text(SMALL_SHARDS)
    before = os.environ.get("PYTHONPATH", "")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{directory}{os.pathsep}{before}")
        yield


@pytest.fixture(scope="module")
def cached(parameters: dict[str, Any]) -> dict[str, Any]:
    return parameters | {"teacher": "cached", "target_workers": 2}


def make_targets(work: Path, parameters: dict[str, Any]) -> None:
    with pytest.raises(LiquidError, match=r"^anneal failed: --alpha_schedule"):
        run_pipeline(work, parameters | WITHOUT_TRAINING)


def shares(work: Path) -> list[Path]:
    """Where each worker has written, in order."""
    return sorted(work.glob("runs/*/*/for-loop-*/teacher-targets/targets"))


def content(work: Path) -> dict[str, bytes]:
    """By name: every file of the targets; hidden ones are the storage's own."""
    files = [path for share in shares(work) for path in share.glob("[!.]*")]
    return {path.name: path.read_bytes() for path in files}


def index(work: Path) -> dict[str, Any]:
    (path,) = work.glob("runs/*/*/join-targets/targets/targets.json")
    return dict(json.loads(path.read_text()))


class Killer(threading.Thread):
    """Kills a worker once its first shard is whole, as a platform that takes its machine away."""

    def __init__(self, work: Path, worker: int) -> None:
        super().__init__(daemon=True)
        self.work, self.worker = work, worker
        self.kept: dict[str, int] = {}
        """By name of a file that was whole: when it was written, by the file system's clock."""

    def run(self) -> None:
        pattern = f"runs/*/*/for-loop-*-iteration-{self.worker}/*/targets/train-*.json"
        while not (whole := list(self.work.glob(pattern))):
            time.sleep(0.002)
        for child in psutil.Process().children(recursive=True):
            # Not what other tests have started, such as an object server
            if "executor_main" in " ".join(child.cmdline()):
                child.kill()
        shards = [path.with_suffix(".bin") for path in whole]
        self.kept = {path.name: path.stat().st_mtime_ns for path in shards}


@pytest.fixture(scope="module")
def killed(cached: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Killer]:
    """Targets that two workers have made, one of which was killed on the way."""
    work = tmp_path_factory.mktemp("killed")
    killer = Killer(work, worker=1)
    killer.start()
    make_targets(work, cached)
    return work, killer


def test_a_killed_worker_goes_on_behind_its_last_whole_shard(
    killed: tuple[Path, Killer], capsys: pytest.CaptureFixture[str]
) -> None:
    work, killer = killed
    told = min(work.glob("runs/*/pipeline.log")).read_text()
    ends = re.findall(r"'teacher-targets'\S* finished with status \S*?(SUCCESS|FAILURE)", told)
    assert sorted(ends) == ["FAILURE", "SUCCESS", "SUCCESS"]
    share = shares(work)[1]
    assert len(list(share.glob("train-*.bin"))) > len(killer.kept) > 0, "it was killed on the way"
    assert {name: (share / name).stat().st_mtime_ns for name in killer.kept} == killer.kept


@pytest.mark.soak
def test_one_worker_makes_the_same_bit_for_bit(
    killed: tuple[Path, Killer], cached: dict[str, Any], tmp_path: Path
) -> None:
    work, _ = killed
    make_targets(tmp_path, cached | {"target_workers": 1})
    assert len(shares(work)) == 2
    assert len(shares(tmp_path)) == 1
    assert content(work) == content(tmp_path)
    assert len([name for name in content(work) if name.startswith("train-")]) >= 16
    assert index(work)["fingerprint"] == index(tmp_path)["fingerprint"]


def test_what_follows_takes_all_of_it_from_the_cache(
    killed: tuple[Path, Killer], cached: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    work, _ = killed
    run = run_pipeline(work, cached)
    assert run.cached == ["prepare", "plan-targets", "teacher-targets", "join-targets"]
    assert "teacher-online" not in run.ran
    assert "in place of the teacher: its targets at" in capsys.readouterr().out
    rows = json.loads(Path(run.outputs["report"].path).with_name("metrics.json").read_text())
    assert len(rows) == 4
    # Another seed, and the same temperatures at other updates
    make_targets(work, cached | {"seed": 8, "anneal_temp_schedule": "0:1.2,2:1.0"})
    shown = re.findall(r"── (\S+): started", capsys.readouterr().out)
    assert shown == ["plan-targets", "anneal"]
    assert len(shares(work)) == 2
    again = run_pipeline(work, cached)
    assert again.ran == []
    values = parameter_defaults() | cached
    on = [stage for stage in STAGES.values() if stage.runs_with(values) and not stage.setting]
    assert again.cached == [stage.title for stage in on]
