"""A run that pauses on the way, and goes on to the end that it would have had."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import entrypoint
from trainer.checkpoints.reading import read_checkpoint
from trainer.runtime.errors import UsageError
from trainer.settings.config import TrainConfig

Settings = dict[str, Any]


def metrics_by_step(location: Path) -> dict[int, dict[str, float]]:
    metas = [json.loads(path.read_text()) for path in location.glob("*.meta.json")]
    return {meta["step"]: meta["metrics"] for meta in metas if meta["metrics_step"] == meta["step"]}


def test_a_run_that_pauses_ends_as_one_that_does_not(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The learning rate and the schedules of an update are those of the whole run."""
    caplog.set_level(logging.INFO)
    settings |= {"alpha_schedule": "0:0.7,2:0.3", "eval_every": 6, "save_every": 100}
    paused, unbroken = tmp_path / "paused", tmp_path / "unbroken"
    one, other = (settings | {"output_gcs_uri": str(place)} for place in (paused, unbroken))
    first = entrypoint.run(one | {"stop_at": 4})
    assert first is not None
    assert first.step == 4
    assert not (paused / "final.pt").exists()
    assert read_checkpoint(paused / "ckpt_step_4.pt").meta["lr"] > 1e-4, "it is not at its end"
    assert metrics_by_step(paused)[4] == first.metrics

    again = entrypoint.run(one | {"stop_at": 4})
    assert again == first
    assert "nothing to do" in caplog.text
    last = entrypoint.run(one | {"stop_at": 6})
    assert last is not None
    assert "training from step 4 to 6" in caplog.text
    entrypoint.run(other)
    finals = [read_checkpoint(place / "final.pt") for place in (paused, unbroken)]
    for name, value in finals[1].weights.items():
        assert torch.equal(value, finals[0].weights[name]), name
    assert finals[0].meta["metrics"] == finals[1].meta["metrics"]
    # Behind the pause already: what was asked for is there
    assert entrypoint.run(one | {"stop_at": 4}) == last


def test_a_pause_whose_evaluation_was_cut_off_is_made_up_for(
    settings: Settings, tmp_path: Path
) -> None:
    settings |= {"eval_every": 100, "save_every": 3, "output_gcs_uri": str(tmp_path / "run")}
    entrypoint.run(settings | {"stop_at": 4})
    for path in (tmp_path / "run").glob("*"):
        if path.is_file() and "step_3" not in path.name:
            path.unlink()  # as if it had been stopped after its third update
    result = entrypoint.run(settings | {"stop_at": 3})
    assert result is not None
    assert (result.step, result.best_step) == (3, 3)
    assert metrics_by_step(tmp_path / "run")[3] == result.metrics


def test_where_a_run_cannot_pause(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--stop_at=7 is past the last of --train_steps=6"):
        TrainConfig(train_steps=6, stop_at=7)
    with pytest.raises(UsageError, match="--stop_at=0 must be at least 1"):
        TrainConfig(stop_at=0)
    entrypoint.run(settings | {"train_steps": 3, "local_workdir": str(tmp_path / "base")})
    later = {"resume_gcs_uri": str(tmp_path / "base" / "final.pt"), "stop_at": 3}
    with pytest.raises(UsageError, match=r"--stop_at=3 is not past step 3, where .*final.pt is"):
        entrypoint.run(settings | later)
