"""What a checkpoint says about its run is checked like settings: type, range, and how much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import base_package_payload, save_student
from trainer import entrypoint
from trainer.checkpoints.fields import check_trainer_state
from trainer.checkpoints.metadata import run_settings_of
from trainer.checkpoints.reading import read_checkpoint
from trainer.checkpoints.sidecar import Sidecar
from trainer.checkpoints.snapshots import read_from
from trainer.runtime.commands import run_command
from trainer.runtime.errors import CheckpointError
from trainer.storage.files import crc32c_of
from trainer.training.progress import Progress

Settings = dict[str, Any]

NUMBERS = ("x", [1], {}, True, None, 1.5, math.nan, 2**70, torch.zeros(2))
"""None of them is a count."""

STATE: dict[str, tuple[Any, ...]] = {
    "best_step": (*NUMBERS, -2, 8),
    "metrics_step": (*NUMBERS, -2, 8),
    "first_step": (*NUMBERS, -2, 8),
    "skipped": (*NUMBERS, -1, 8),
    "skipped_in_row": (*NUMBERS, -1, 8),
    "best_value": ("x", [1], {}, True, None, math.nan, -math.inf, -1.0, 10**400),
    "metrics": (1, "x", [1], None, {"a": "b"}, {"a": True}, {1: 2.0}, {"a": [1]}),
    "window": (
        *(1, "x", [2.0], None, {"updates": 2}, {1: 2.0}),
        *(
            {"seconds": 1.0, "updates": 2, "sums": [[[0.0] * 4] * 2]} | wrong
            for wrong in (
                *({"seconds": value} for value in ("x", -1.0, math.nan, math.inf, True, None)),
                *({"updates": value} for value in (-1, 8, 1.5, "1", [0])),
                *({"sums": value} for value in ("x", [], {}, [[[0.0] * 4]], [[[0.0] * 3] * 2])),
                *({"sums": [[[0.0] * 3 + [wrong]] * 2]} for wrong in ("x", math.nan, 10**400)),
            )
        ),
    ),
    "loss_scale": (
        *(1, "x", [2.0], None, {"scale": 2.0}, {1: 2.0}),
        *(
            {"scale": 2.0, "growth_factor": 2.0, "backoff_factor": 0.5}
            | {"growth_interval": 10, "_growth_tracker": 0}
            | wrong
            for wrong in (
                *({"scale": value} for value in ("x", 0.0, -1.0, 1e39, math.nan, True, None)),
                *({"growth_factor": value} for value in (1.0, 1e300, "2")),
                *({"backoff_factor": value} for value in (0.0, 1.0, math.nan)),
                *({"growth_interval": value} for value in (0, 1.5, "1")),
                *({"_growth_tracker": value} for value in (-1, 0.5, [0], 2**31)),
            )
        ),
    ),
}


@pytest.mark.parametrize("name", STATE)
def test_every_field_of_the_trainer_state_has_a_type_and_a_range(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    payload = base_package_payload(trained=24, rows=32, step=7)
    for value in STATE[name]:
        with pytest.raises(CheckpointError) as caught:
            check_trainer_state({name: value}, 7, str(path))
        message = str(caught.value)
        assert message.startswith(f"{path}: its trainer_state's {name}"), message
        assert "\n" not in message
        assert len(message) < 300
    # Through a file too, as far as it can hold the value
    torch.save(payload | {"trainer_state": {name: STATE[name][0]}}, path)
    with pytest.raises(CheckpointError, match=f"x.pt: its trainer_state's {name} is "):
        read_checkpoint(path)


def test_a_state_as_runs_write_it_is_read_into_a_record(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    state = {"best_value": math.inf, "best_step": -1, "metrics": {"a": math.nan, "b": math.inf}}
    state |= {"metrics_step": 7, "skipped": 7, "first_step": 0, "loss_scale": scaler.state_dict()}
    payload = base_package_payload(trained=24, rows=32, step=7) | {"trainer_state": state}
    torch.save(payload, tmp_path / "x.pt")
    read = read_checkpoint(tmp_path / "x.pt").trainer_state
    progress = Progress.load(read)
    assert (progress.best_step, progress.metrics_step, progress.skipped) == (-1, 7, 7)
    assert (progress.skipped_in_row, progress.first_step) == (0, 0)
    for unscaled in ({}, {"loss_scale": {}}):
        check_trainer_state(unscaled, 7, "x")


META: dict[str, tuple[Any, ...]] = {
    "block_size": ("x", 0, -1, 1.5, [1], True, 10**30),
    "metrics_step": ("x", -2, 8, 1.5, [1], True),
    "save_best_on": (1, ["a"], {}),
    "teacher_name": (1, ["a"], {}, True),
    "tokenizer": (1, ["a"]),
    "pos_embedding": (1, "absolute", [1], {"type": 1}, {"trained_positions": "x"}),
    "pos_embedding.trained_positions": (-1, 1.5, True, [1]),
    "pos_embedding.num_embeddings": (-1, "x"),
    "dataset": (1, "x", [1]),
    "dataset.fingerprint": (1, ["x"], {}, True),
    "model": (1, "x", [1]),
    "model.d_model": (0, "x", 1.5),
    "settings": (1, "x", [1]),
    "origin": (1, "x", ["checkpoint"]),
    "origin.checkpoint": (1, ["x"], {}),
    "origin.step": (-1, "x", 1.5, True),
    "origin.block_size": (0, "x", 1.5),
    "origin.metrics": (1, "x", {"a": "b"}, [1]),
    "pending_schedules": (1, "x"),
}


def nested(name: str, value: Any) -> dict[str, Any]:
    outer, _, inner = name.partition(".")
    return {outer: {inner: value} if inner else value}


@pytest.mark.parametrize("name", META)
def test_every_field_of_metadata_has_a_type_and_a_range(tmp_path: Path, name: str) -> None:
    """In the file and in its sidecar."""
    path = tmp_path / "x.pt"
    save_student(path)
    payload = torch.load(path, weights_only=True)
    described = json.loads((tmp_path / "x.pt.meta.json").read_text())
    for value in META[name]:
        damaged = payload["meta"] | nested(name, value)
        torch.save(payload | {"meta": damaged}, path)
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        message = str(caught.value)
        # Numbers beyond a float's are refused as no number at all
        if value != 10**30:
            assert message.startswith(f"{path}: its metadata's {name}"), message
        data = json.dumps(described | nested(name, value)).encode()
        with pytest.raises(CheckpointError, match=f"sidecar of x.pt: its metadata's {name}"):
            Sidecar.parse(data, "x.pt")


def test_absent_and_null_fields_are_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_student(path)
    payload = torch.load(path, weights_only=True)
    for name in META:
        for meta in (
            payload["meta"] | nested(name, None),
            {key: value for key, value in payload["meta"].items() if key != name.split(".")[0]},
        ):
            torch.save(payload | {"meta": meta}, path)
            assert read_checkpoint(path).step == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"size": [%s], "crc32c": "x"}' % (b"1," * 5000 + b"1"), "no valid 'size': a list"),
        (b'{"size": %s}' % (b"[" * 900 + b"]" * 900), "no valid 'size': a list"),
        (b'"%s"' % (b"x" * 5000), "no valid 'size': None"),
        (
            b'{"size": 1, "crc32c": "x", "step": 1, "metrics": {}, "a": %s}'
            % (b"[" * 900 + b"]" * 900),
            "larger than any run's",
        ),
        (
            b'{"size": 1, "crc32c": "x", "step": 1, "metrics": {}, "a": "\\ud800"}',
            "which is not Unicode",
        ),
        (
            b'{"size": 1, "crc32c": "x", "step": 1, "metrics": {}, "a": [%s1]}' % (b"1," * 2000000),
            "larger than any run's",
        ),
    ],
    ids=["long", "deep", "text", "deep field", "surrogate", "many"],
)
def test_sidecars_that_are_too_much(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Sidecar.parse(content, "best.pt")
    assert len(str(caught.value)) < 300


def test_settings_of_a_run_that_cannot_be_are_named_with_the_file() -> None:
    for name, value in (("alpha", 3.0), ("seed", "x"), ("betas", [1]), ("alpha_schedule", "x")):
        with pytest.raises(CheckpointError, match=f"its settings cannot work: --{name}="):
            run_settings_of({"settings": {name: value}})


# ── weights


def weights_with(value: torch.Tensor) -> dict[str, Any]:
    payload = base_package_payload(trained=24, rows=32, step=7)
    payload["model"] = dict(payload["model"]) | {"ln_f.bias": value}
    return payload


def nan_of(dtype: torch.dtype) -> torch.Tensor:
    return torch.full((16,), math.nan).to(dtype)


NANS: dict[str, torch.Tensor] = {
    **{str(dtype): nan_of(dtype) for dtype in (torch.float64, torch.float16, torch.bfloat16)},
    "fp8 e5m2": nan_of(torch.float8_e5m2),
    "fp8 e4m3": nan_of(torch.float8_e4m3fn),
    "complex": nan_of(torch.complex64),
    "infinite": torch.full((16,), -math.inf),
    "too wide": torch.full((16,), -1e39, dtype=torch.float64),
    "last of all": torch.cat([torch.zeros(15), nan_of(torch.float32)[:1]]),
    "in a view": torch.cat([torch.zeros(31), nan_of(torch.float32)[:1]])[1::2],
    "in a column": torch.stack([torch.zeros(16), nan_of(torch.float32)])[:, 5:6].expand(2, 1),
    "a parameter": torch.nn.Parameter(nan_of(torch.float32)),
    "negative bit": torch._neg_view(nan_of(torch.float32)),
    "sparse": nan_of(torch.float32).to_sparse(),
}


@pytest.mark.parametrize("name", NANS)
def test_nan_in_weights_is_found_however_they_are_reached(tmp_path: Path, name: str) -> None:
    torch.save(weights_with(NANS[name]), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not finite|not a dense float one|other parts"):
        read_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("name", NANS)
def test_nan_in_a_moment_is_found(tmp_path: Path, name: str, key: str) -> None:
    payload = base_package_payload(trained=24, rows=32, step=7)
    payload["optimizer"]["state"][2][key] = NANS[name]
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not finite|not a dense float one|other parts"):
        read_checkpoint(tmp_path / "x.pt").optimizer_by_name()


def test_shared_storage_with_nan_in_one_view_is_found(tmp_path: Path) -> None:
    whole = torch.zeros(32)
    whole[20] = math.nan
    torch.save(weights_with(whole[:16]), tmp_path / "x.pt")
    assert read_checkpoint(tmp_path / "x.pt").weights["ln_f.bias"].eq(0).all()
    torch.save(weights_with(whole[16:]), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="ln_f.bias has values that are not finite"):
        read_checkpoint(tmp_path / "x.pt")


def test_messages_show_no_more_than_a_line_of_what_a_file_says(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    payload = base_package_payload(trained=24, rows=32, step=7)
    long = "x\n\x1b[31m" * 5000
    groups = [{"params": list(range(len(payload["model"])))}]
    entries: list[dict[str, Any]] = [{long: long}, {long: 1.0}, {"step": long}]
    changes: list[dict[str, Any]] = [
        {"meta": {"step": long}},
        {"meta": {"seed": long}},
        {"meta": {"alpha_schedule": f"0:{long}"}},
        {"meta": {"model": {"n_heads": long}}},
        {"meta": {"block_size": long}},
        {"trainer_state": {"best_step": long}},
        {"model": {long: torch.zeros(2)}},
        {"step": long},
        *({"optimizer": {"state": {0: entry}, "param_groups": groups}} for entry in entries),
    ]
    for change in changes:
        torch.save(payload | change, path)
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path).settings, read_checkpoint(path).optimizer_by_name()
        message = str(caught.value)
        assert message.isprintable(), message
        assert len(message) < 500, message


# ── at the run's own location


def test_a_run_passes_over_a_snapshot_whose_state_cannot_be(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings |= {"train_steps": 4, "save_every": 2, "eval_every": 2}
    entrypoint.run(settings)
    work = tmp_path / "work"
    for path in work.glob("*.pt"):
        if path.name != "ckpt_step_2.pt":
            damage(path, {"best_step": "never"})
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert run_command(entrypoint.main, flags) == 0
    assert "its trainer_state's best_step is 'never', not a whole" in capsys.readouterr().err
    assert read_from(str(work / "final.pt"), work).step == 4
    for path in work.glob("*.pt"):
        damage(path, {"loss_scale": {"scale": -1}})
    assert run_command(entrypoint.main, flags) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "none can be used" in last
    assert "its trainer_state's loss_scale lacks growth_factor" in last


def damage(path: Path, change: dict[str, Any]) -> None:
    """Change the trainer state of a checkpoint, whose sidecar is made to fit."""
    payload = torch.load(path, weights_only=True)
    payload["trainer_state"] |= change
    path.unlink()  # several names may be of one file
    torch.save(payload, path)
    described = path.with_name(f"{path.name}.meta.json")
    content = json.loads(described.read_text())
    content |= {"size": path.stat().st_size, "crc32c": crc32c_of(path)}
    described.write_text(json.dumps(content))
