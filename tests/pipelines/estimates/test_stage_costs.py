"""The arithmetic of an estimate, against sums made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.estimates.plan import plan_of_run
from pipelines.estimates.stages import Estimate, StageCost, estimate
from pipelines.estimates.text import text
from pipelines.settings import load_settings

H100 = {"MACHINE_TYPE": "a3-highgpu-1g", "ACCELERATOR_TYPE": "NVIDIA_H100_80GB"}
NO_EVALUATION = {"eval_max_tokens": 1}


def on(stage: str, machine: dict[str, str]) -> dict[str, str]:
    return {f"{stage}_{name}": value for name, value in machine.items()}


def estimated(
    parameters: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    backend: str = "vertex",
) -> Estimate:
    settings = load_settings(environ or {})
    return estimate(plan_of_run(settings, parameters or {}, backend, cache=True))


def line(found: Estimate, title: str) -> StageCost:
    return next(stage for stage in found.stages if stage.title == title)


def seconds(stage: StageCost) -> float:
    amount = stage.seconds()
    assert amount is not None
    assert amount.per_token == 0.0
    return amount.fixed


def test_a_measured_training() -> None:
    found = line(estimated({"anneal_more_settings": NO_EVALUATION}, on("ANNEAL", H100)), "anneal")
    assert found.tokens == 1200 * 64 * 512
    # 39,321,600 tokens at 125,600 a second, 29 s beside them, 300 s to start
    assert seconds(found) == pytest.approx(313.07 + 29 + 300, abs=0.1)
    price = found.price()
    assert price is not None
    assert price.fixed == pytest.approx(11.06 * 1.15 * 642.07 / 3600, abs=0.001)
    assert found.known == "measured"
    low, high = found.seconds(-1), found.seconds(1)
    assert low is not None
    assert high is not None
    assert low.fixed == pytest.approx(342.07 / 1.1 + 150, abs=0.1)
    assert high.fixed == pytest.approx(342.07 * 1.1 + 600, abs=0.1)


def test_a_training_by_the_rule() -> None:
    """By hand, for each token: the student's 6 x 109,376,256 + 6 x 10 x 768 x 512 operations at
    0.4 of 312e12 a second, the teacher's 2 x 1,554,971,200 + 2 x 48 x 1,600 x 512 at 0.6."""
    found = line(estimated({"anneal_more_settings": NO_EVALUATION}), "anneal")
    each = 679_850_496 / 124.8e12 + 3_188_585_600 / 187.2e12 + 0.005 * (1 / 4096 - 1 / 16_384)
    assert each == pytest.approx(23.396e-6, rel=1e-4)
    assert seconds(found) == pytest.approx(39_321_600 * 23.396e-6 + 29 + 300, abs=0.1)
    assert found.known == "by FLOPs, A100 not measured"


def test_alpha_0_throughout_runs_no_teacher() -> None:
    off = {"anneal_alpha": 0.0, "anneal_alpha_schedule": "", "anneal_more_settings": NO_EVALUATION}
    found = estimated(off, on("ANNEAL", H100))
    assert seconds(line(found, "anneal")) == pytest.approx(39_321_600 / 380_500 + 329, abs=0.1)
    assert line(found, "continue").known == "by FLOPs, A100 not measured"


def test_a_cached_teacher_is_run_by_its_workers_at_the_same_time() -> None:
    environ = on("TARGETS", H100) | {"TARGETS_SCHEDULING": "spot"}
    found = estimated({"teacher": "cached", "target_workers": 8}, environ)
    titles = [stage.title for stage in found.stages]
    assert titles[1:4] == ["plan-targets", "teacher-targets", "join-targets"]
    assert "teacher-online" not in titles
    targets = line(found, "teacher-targets")
    assert targets.machine == "8 × a3-highgpu-1g, 1 H100, spot"
    assert seconds(targets) == pytest.approx(118e6 / 8 / 164_700 + 20 + 300, abs=0.1)
    price = targets.price()
    assert price is not None
    assert price.fixed == pytest.approx(8 * 3.30 * 1.15 * seconds(targets) / 3600)
    assert any("spot machines" in note for note in found.notes)
    online = line(estimated({}), "anneal")
    assert seconds(line(found, "anneal")) < seconds(online)


def test_several_machines_and_gpus() -> None:
    h100 = {
        "MACHINE_TYPE": "a3-highgpu-8g",
        "ACCELERATOR_TYPE": "NVIDIA_H100_80GB",
        "ACCELERATOR_COUNT": "8",
    }
    environ = on("CONTINUE", h100 | {"REPLICAS": "2"}) | on("ANNEAL", h100)
    found = estimated({"continue_more_settings": NO_EVALUATION}, environ)
    continued = line(found, "continue")
    # As grad_accum is given, each of 16 GPUs adds its windows to an update
    assert continued.tokens == 6000 * 2 * 8 * 16 * 1024
    rate = 125_100 * 16 * 0.96 * 0.85
    assert seconds(continued) == pytest.approx(continued.tokens / rate + 16 + 300, abs=0.1)
    price = continued.price()
    assert price is not None
    assert price.fixed == pytest.approx(2 * 88.49 * 1.15 * seconds(continued) / 3600)
    assert continued.known == "measured, × 16 at 0.82 (assumed)"
    # An update of the annealing has 64 windows, however many GPUs share them
    assert line(found, "anneal").tokens == 1200 * 64 * 512


def test_a_data_set_that_is_not_known_counts_by_the_million() -> None:
    found = estimated({"teacher": "cached", "dataset_name": "owner/data"})
    prepare = line(found, "prepare").seconds()
    assert prepare is not None
    assert (prepare.fixed, prepare.per_token) == (60, pytest.approx(1 / 8e5))
    targets = line(found, "teacher-targets").seconds()
    assert targets is not None
    assert targets.per_token > 0
    assert found.seconds().per_token == pytest.approx(targets.per_token + prepare.per_token)
    assert "the tokens of 'owner/data' are not known" in found.notes[0]
    # Another teacher has another tokenizer
    assert any("'wikitext'" in note for note in estimated({"teacher_name": "owner/model"}).notes)


def test_a_local_data_set_counts_by_its_size(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(b"x" * 44_000)
    (tmp_path / "validation.jsonl").write_bytes(b"x" * 4_400)
    found = estimated({"dataset_name": str(tmp_path)})
    assert line(found, "prepare").tokens == pytest.approx(10_000)
    assert line(found, "evaluate").tokens == pytest.approx(3 * 2 * 1_000)


def test_an_empty_validation_split_takes_no_time(tmp_path: Path) -> None:
    for name, size in (("train", 44_000), ("validation", 0)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    found = estimated({"dataset_name": str(tmp_path)})
    assert seconds(line(found, "evaluate")) < 600
    assert "inf" not in text(found)


def test_what_cannot_be_estimated_is_left_out_and_said() -> None:
    found = estimated({"teacher_name": "owner/model"})
    anneal = line(found, "anneal")
    assert (anneal.seconds(), anneal.price()) == (None, None)
    assert anneal.known.startswith("not estimated: the teacher's size")
    assert any("'owner/model' is not known here" in note for note in found.notes)
    slow = estimated({"anneal_more_settings": {"fp32": True}})
    assert "fp32 on a GPU was not measured" in line(slow, "anneal").known
    other = estimated({}, {"ANNEAL_ACCELERATOR_TYPE": "amd.com/gpu"}, "kfp")
    assert line(other, "anneal").known == "not estimated: nothing is known of amd.com/gpu"


def test_a_cluster_has_no_prices() -> None:
    found = estimated({}, {}, "kfp")
    assert line(found, "anneal").price() is None
    assert line(found, "anneal").machine == "12 CPU, 85Gi, 1 A100"
    assert found.price().fixed == 0.0


def test_a_training_longer_than_its_timeout_is_noted() -> None:
    found = estimated({"continue_train_steps": 10**6}, {"CONTINUE_TIMEOUT_HOURS": "2"})
    assert any("continue takes longer than the 2 hours" in note for note in found.notes)


def test_another_region_has_other_prices() -> None:
    found = estimated({}, {"REGION": "europe-west4"})
    assert any("the run is in europe-west4" in note for note in found.notes)


def test_a_machine_without_a_price_is_left_out_of_the_sum_and_said() -> None:
    machine = {"MACHINE_TYPE": "n1-ultramem-40", "ACCELERATOR_TYPE": "NVIDIA_TESLA_V100"}
    found = estimated({}, on("ANNEAL", machine))
    assert line(found, "anneal").price() is None
    assert seconds(line(found, "anneal")) > 300
    assert any("has no price for n1-ultramem-40, 1 V100" in note for note in found.notes)
    assert found.price().fixed < estimated({}).price().fixed
