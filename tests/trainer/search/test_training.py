"""A trial trained at its place: what is there already is not trained again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from trainer.runtime import processes
from trainer.runtime.errors import MetricsError
from trainer.search.training import loss_at, share_code, train_trial
from trainer.search.trials import Outcome, Trial, location_name
from trainer.settings.config import TrainConfig

Common = dict[str, Any]


@pytest.fixture
def common(settings: dict[str, Any]) -> Common:
    left_out = ("dataset_name", "cache_dir")
    return {name: value for name, value in settings.items() if name not in left_out}


@pytest.fixture
def places(tokens_dir: Path, targets_dir: Path, tmp_path: Path) -> dict[str, str]:
    return {
        "tokens_dir": str(tokens_dir),
        "targets": str(targets_dir),
        "trials_uri": str(tmp_path / "trials"),
    }


def trained(trial: Trial, common: Common, places: dict[str, str], stop_at: int = 0) -> Outcome:
    outcome = train_trial(trial, common, **places, stop_at=stop_at)
    assert outcome is not None
    return outcome


def test_a_trial_goes_on_from_rung_to_rung_and_is_trained_once(
    common: Common, places: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    trial = Trial({"alpha_schedule": "0:0.7,3:0.4", "lr_peak": 2e-3}, seed=3)
    rung = trained(trial, common, places, stop_at=4)
    whole = trained(trial, common, places)
    assert rung.place == whole.place
    assert Path(whole.place).name.startswith("alpha0.7-0.4_T1_lr0.002_seed3_")
    assert (rung.step, rung.tokens, whole.step, whole.tokens) == (4, 4 * 128, 6, 6 * 128)
    assert not whole.control
    assert rung.loss is not None
    assert whole.loss is not None
    assert rung.loss > whole.loss
    assert rung.eval_tokens == whole.eval_tokens == 270, "the tokens predicted of 271"
    caplog.set_level(logging.INFO)
    # Of the rung, though the run has gone further
    assert trained(trial, common, places, stop_at=4) == rung
    assert trained(trial, common, places) == whole
    assert sum("nothing to do" in line for line in caplog.messages) == 2
    with pytest.raises(MetricsError, match="tells no val_loss_student of step 5; remove"):
        loss_at(whole.place, 5, "val_loss_student")


def test_a_trial_without_distillation_reads_no_targets(
    common: Common, places: dict[str, str]
) -> None:
    absent = places | {"targets": "/nowhere"}
    outcome = trained(Trial({"alpha": 0.0}, seed=1), common, absent)
    assert outcome.control
    assert Path(outcome.place).name.startswith("ce-only_lr0.001_seed1_")


def test_a_training_that_cannot_go_on_is_an_outcome(common: Common, places: dict[str, str]) -> None:
    wild = {"alpha": 0.0, "lr_peak": 1e18, "max_nonfinite": 1, "warmup_steps": 0}
    outcome = trained(Trial(wild, seed=1), common, places)
    assert outcome.loss is None
    assert outcome.failed
    assert outcome.tokens == 0


def test_a_training_of_several_processes_that_cannot_go_on_is_one_too(
    common: Common, places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine of several GPUs; the processes that torchrun starts are on the CPU here."""
    monkeypatch.setattr(processes, "count_gpus", lambda _: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    wild = {"alpha": 0.0, "lr_peak": 1e18, "max_nonfinite": 1, "warmup_steps": 0, "micro_batch": 2}
    outcome = trained(Trial(wild, seed=1), common, places)
    assert outcome.loss is None
    assert "finite" in outcome.failed


def test_what_decides_a_result_decides_the_place() -> None:
    config = {"block_size": 32, "train_steps": 10}
    base = location_name(TrainConfig(**config), "tokens", "targets")
    assert (
        location_name(TrainConfig(**config, save_every=3, stop_at=5), "tokens", "targets") == base
    )
    others = [
        location_name(TrainConfig(**config, dropout=0.1), "tokens", "targets"),
        location_name(TrainConfig(**config, resume_gcs_uri="gs://b/x.pt"), "tokens", "targets"),
        location_name(TrainConfig(**config), "others", "targets"),
        location_name(TrainConfig(**config), "tokens", "others"),
        location_name(TrainConfig(**config), "tokens", None),
    ]
    assert len({base, *others}) == 6


def test_compiled_code_is_shared_by_the_first_that_has_it(tmp_path: Path) -> None:
    for name, content in (("nothing", b""), ("one", b"first"), ("two", b"second")):
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "compile_cache.bin").write_bytes(content)
        share_code(str(tmp_path / name), str(tmp_path))
    (shared,) = tmp_path.glob("compile_cache_torch-*.bin")
    assert shared.read_bytes() == b"first"


def test_trials_of_other_batches_have_places_of_their_own(
    common: Common, places: dict[str, str]
) -> None:
    """``grad_accum`` and ``micro_batch`` decide it too where no global batch is given."""
    del common["global_batch"]
    trial = Trial({"alpha": 0.0}, seed=1)
    outcomes = [trained(trial, common | {"grad_accum": steps}, places) for steps in (1, 2)]
    assert [one.tokens for one in outcomes] == [6 * 4 * 32, 6 * 8 * 32]
    assert outcomes[0].place != outcomes[1].place
