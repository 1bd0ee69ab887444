"""Checkpoints of the flat layout, before the packages: `tests/fixtures/old_layout` holds one.

It is a run's snapshot of step 4 of 8, with its teacher, its tokens and its flags.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import entrypoint
from trainer.checkpoints.metadata import FORMAT_VERSION
from trainer.checkpoints.reading import read_checkpoint
from trainer.runtime.commands import run_command
from trainer.settings.layers import Resolved
from trainer.storage.digests import digest_of_file
from trainer.training import run
from trainer.training.start import Start

FIXTURE = Path(__file__).parents[1] / "fixtures" / "old_layout"
NAME = "ckpt_step_4.pt"

Captured = list[tuple[Resolved, Start]]


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The flags of the old run, in a directory with its teacher and tokens, by the same names."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "tokens"):
        shutil.copytree(FIXTURE / name, name)
    return list(json.loads((FIXTURE / "flags.json").read_text()))


def place_snapshot(directory: str) -> dict[str, Any]:
    """Copy the checkpoint and its sidecar; returns what stock torch reads from the file."""
    Path(directory).mkdir()
    for file in FIXTURE.glob(f"{NAME}*"):
        shutil.copy(file, directory)
    return dict(torch.load(FIXTURE / NAME, weights_only=True))


def captured(monkeypatch: pytest.MonkeyPatch, name: str) -> Captured:
    """What ``run.<name>`` is called with and gives, as it was before any update."""
    starts: Captured = []
    original: Callable[..., Start] = getattr(run, name)

    def spy(resolved: Resolved, checkpoint: Any) -> Start:
        start = original(resolved, checkpoint)
        starts.append((resolved, copy.deepcopy(start)))
        return start

    monkeypatch.setattr(run, name, spy)
    return starts


def assert_state(start: Start, payload: dict[str, Any]) -> None:
    """Weights and both moments are those of the file, bit for bit."""
    weights = start.student.state_dict()
    assert weights.keys() == payload["model"].keys()
    for name, tensor in payload["model"].items():
        assert torch.equal(weights[name], tensor), name
    names = payload["trainer_state"]["optimizer_names"]
    assert sorted(start.optimizer_state) == sorted(names)
    for index, name in enumerate(names):
        for key, value in payload["optimizer"]["state"][index].items():
            assert torch.equal(start.optimizer_state[name][key], value), (name, key)


def test_a_run_goes_on_from_a_snapshot_of_the_old_layout(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = place_snapshot("run")
    starts = captured(monkeypatch, "from_own_snapshot")
    assert run_command(entrypoint.main, flags) == 0
    ((resolved, start),) = starts
    assert_state(start, payload)
    assert start.step == payload["step"] == 4
    assert start.trainer_state == payload["trainer_state"]
    assert start.trained_positions == 16
    assert start.tokens == payload["meta"]["dataset"]["fingerprint"]
    newer = {"teacher_revision": None}
    assert resolved.config.run_settings() == payload["meta"]["settings"] | newer
    sources = {"alpha_schedule": "command line", "weight_decay": "checkpoint"}
    sources |= {"grad_accum": "derived", "global_batch": "command line", "cache_dir": "default"}
    assert {name: resolved.sources[name] for name in sources} == sources
    final = read_checkpoint(Path("run/final.pt"))
    assert final.step == 8
    assert final.meta["settings"] == payload["meta"]["settings"] | newer
    assert final.meta["format_version"] == FORMAT_VERSION


def test_a_second_phase_starts_from_a_checkpoint_of_the_old_layout(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = place_snapshot("source")
    starts = captured(monkeypatch, "new_phase")
    own = ("--local_workdir", "--alpha_schedule", "--temp_schedule", "--train_steps")
    kept = [flag for flag in flags if not flag.startswith(own)]
    places = ["--local_workdir=second", f"--resume_gcs_uri=source/{NAME}"]
    assert run_command(entrypoint.main, [*kept, *places, "--train_steps=3"]) == 0
    ((resolved, start),) = starts
    assert_state(start, payload)
    assert (start.step, start.trainer_state) == (0, {})
    assert start.origin == {
        "checkpoint": f"source/{NAME}",
        "step": 4,
        "block_size": 16,
        "metrics": payload["meta"]["metrics"],
        "digest": digest_of_file(f"source/{NAME}"),
    }
    # Its schedules end with its steps; alpha and the temperature go on from where they were
    assert (resolved.config.alpha, resolved.config.T) == (0.5, 1.5)
    assert (resolved.config.alpha_schedule, resolved.sources["alpha_schedule"]) == ("", "default")
    assert (resolved.config.seed, resolved.sources["seed"]) == (42, "checkpoint")
    assert read_checkpoint(Path("second/final.pt")).step == 3
