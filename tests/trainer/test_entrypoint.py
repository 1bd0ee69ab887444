"""The command line as a user meets it: smoke commands, phases, errors and exit statuses."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.samples import base_package_payload, save_teacher
from trainer import entrypoint
from trainer.checkpoints.checkpoint import Snapshot
from trainer.checkpoints.metadata import build_meta
from trainer.checkpoints.reading import read_checkpoint
from trainer.models.positions import resize_positions
from trainer.runtime import log
from trainer.runtime.errors import StorageError, UsageError
from trainer.settings.accumulation import with_accumulation
from trainer.settings.layers import resolve
from trainer.storage.local import LocalLocation
from trainer.training import run
from trainer.training.optimizer import build_optimizer
from trainer.training.start import from_scratch

Settings = dict[str, Any]


def flags(settings: Settings, **changes: Any) -> list[str]:
    merged = settings | changes
    return [f"--{name}={value}" for name, value in merged.items() if value is not None]


def command(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trainer.entrypoint", *argv],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=120,
    )


def messages(stderr: str) -> list[str]:
    return [json.loads(line)["message"] for line in stderr.splitlines()]


# ── smoke commands


@pytest.fixture(scope="module")
def checkpoint(root: Path, tokenizer_dir: Path, corpus: Path) -> tuple[Path, Settings]:
    """A small run's checkpoint at context 512, and the settings that made it."""
    teacher = save_teacher(root / "teacher-1024", tokenizer_dir, vocab=512, positions=1024)
    settings = {
        "teacher_name": str(teacher),
        "dataset_name": str(corpus),
        "cache_dir": str(root / "cache"),
        "block_size": 512,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "micro_batch": 1,
        "global_batch": 2,
        "eval_max_tokens": 2000,
    }
    made = settings | {"local_workdir": str(root / "smoke-source"), "train_steps": 2}
    entrypoint.run(made)
    return root / "smoke-source" / "best.pt", settings


def test_smoke_resume_without_training(checkpoint: tuple[Path, Settings], tmp_path: Path) -> None:
    path, settings = checkpoint
    argv = (
        "--alpha=0.6 --T=1.1 --alpha_schedule=0:0.6,1:0.5 --temp_schedule=0:1.1,1:1.0"
        " --train_steps=0 --eval_every=1 --save_every=1 --log_interval=1"
        " --output_gcs_uri=gs://dummy"
    ).split()
    places = {"resume_gcs_uri": str(path), "local_workdir": str(tmp_path / "w")}
    done = command(*flags(settings, **places), *argv)
    assert done.returncode == 0, done.stderr
    lines = messages(done.stderr)
    for expected in (
        "alpha = 0.6 (command line)",
        "T = 1.1 (command line)",
        "alpha_schedule = '0:0.6,1:0.5' (command line)",
        "train_steps = 0 (command line)",
        "warmup_steps = 2000 (checkpoint)",
        "dropout = 0.0 (checkpoint)",
        "weight_decay = 0.1 (default)",
    ):
        assert expected in lines
    assert not list((tmp_path / "w").glob("*.pt"))


def test_smoke_one_step_without_an_output_location(
    checkpoint: tuple[Path, Settings], tmp_path: Path
) -> None:
    _, settings = checkpoint
    work = {"local_workdir": str(tmp_path / "w")}
    done = command(*flags(settings, **work), "--train_steps=1", "--eval_ctx_lens=512,1024")
    assert done.returncode == 0, done.stderr
    meta = json.loads((tmp_path / "w" / "best.pt.meta.json").read_text())
    assert {"val_loss_student@512", "val_loss_student@1024"} <= set(meta["metrics"])
    assert meta["step"] == 1
    assert list((tmp_path / "w" / "tensorboard").glob("events.*"))
    step = next(line for line in done.stderr.splitlines() if '"step 1/1' in line)
    record = json.loads(step)
    assert record["severity"] == "INFO"
    assert record["tokens_per_second"] > 0
    assert record["memory_gib"] > 0


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.soak
def test_compiled_students_learn_the_same(settings: Settings, tmp_path: Path) -> None:
    weights, logs = {}, {}
    for compiled in ("off", "on"):
        work = {"local_workdir": str(tmp_path / compiled), "compile": compiled}
        # The keys' biases have no gradient but rounding, of which a small epsilon makes whole steps
        done = command(*flags(settings, log_interval=1, train_steps=3, eps=1e-5, **work))
        assert done.returncode == 0, done.stderr
        weights[compiled] = read_checkpoint(tmp_path / compiled / "final.pt").weights
        # torch's compiler may warn of the machine in lines of its own
        ours = [line for line in done.stderr.splitlines() if line.startswith("{")]
        logs[compiled] = [json.loads(line) for line in ours]
    for name, expected in weights["off"].items():
        assert float((weights["on"][name] - expected).norm() / expected.norm()) <= 1e-4, name
    for compiled, lines in logs.items():
        start = next(line for line in lines if "startup_seconds" in line)
        assert start["first_update_seconds"] > 0
        assert ("compilation included" in start["message"]) == (compiled == "on")
        steps = [line for line in lines if "grad_norm" in line]
        # What the first update took is no speed where it compiled
        assert ["tokens_per_second" in line for line in steps] == [compiled == "off", True, True]


# ── checkpoints of the base package


@pytest.fixture
def base_checkpoint(tmp_path: Path) -> Path:
    """Step 68150, no metadata, no sidecar, a long table of which 32 rows were trained."""
    payload = base_package_payload(trained=32, rows=128)
    for name in ("embed.weight", "lm_head.weight"):
        payload["model"][name] = torch.cat([payload["model"][name]] * 8)
    names = list(payload["model"])
    for name in ("embed.weight", "lm_head.weight"):
        state = payload["optimizer"]["state"][names.index(name)]
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.cat([state[key]] * 8)
    path = tmp_path / "base.pt"
    torch.save(payload, path)
    return path


def base_settings(settings: Settings, base_checkpoint: Path) -> Settings:
    drop = ("d_model", "n_layers")
    kept = {name: value for name, value in settings.items() if name not in drop}
    return kept | {"resume_gcs_uri": str(base_checkpoint), "n_heads": 4}


def test_run_a_from_a_base_package_checkpoint_starts_at_step_zero(
    settings: Settings, base_checkpoint: Path, tmp_path: Path
) -> None:
    result = entrypoint.run(
        base_settings(settings, base_checkpoint)
        | {
            "train_steps": 12,
            "warmup_steps": 2,
            "lr_peak": 2.7e-4,
            "alpha_schedule": "0:0.7,4:0.5,8:0.3",
            "temp_schedule": "0:1.2,8:1.0",
            "eval_ctx_lens": (32, 64),
        }
    )
    assert result is not None
    assert result.step == 12
    saved = read_checkpoint(tmp_path / "work" / "final.pt")
    assert saved.weights["pos.weight"].shape == (128, 16), "the table keeps its length"
    assert saved.meta["pos_embedding"]["trained_positions"] == 32
    assert saved.meta["origin"]["step"] == 68150
    assert (saved.meta["kd_alpha"], saved.meta["kd_temperature"]) == (0.3, 1.0)
    counts = {float(m["step"]) for m in saved.optimizer_by_name().values()}
    assert counts == {14.0}, "moments are kept: 2 updates of the base run and 12 of ours"


def test_doubled_context_with_reset(
    settings: Settings, base_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpolated table, fresh optimizer, step 0: seen at the start, before any update."""
    starts: list[Any] = []
    original = run.new_phase

    def spy(*args: Any) -> Any:
        starts.append(original(*args))
        table = starts[-1].student.pos.weight.detach().clone()
        starts[-1].origin["table"] = table
        return starts[-1]

    monkeypatch.setattr(run, "new_phase", spy)
    entrypoint.run(
        base_settings(settings, base_checkpoint)
        | {"block_size": 64, "reset_optim_on_ctx_change": True, "train_steps": 0}
    )
    start = starts[0]
    source = torch.load(base_checkpoint, weights_only=True)["model"]["pos.weight"]
    assert torch.equal(start.origin["table"], resize_positions(source, 32, 64))
    assert (start.step, start.optimizer_state, start.trained_positions) == (0, {}, 64)


def test_doubled_context_without_reset_keeps_moments(
    settings: Settings, base_checkpoint: Path, tmp_path: Path
) -> None:
    changes = {"block_size": 64, "train_steps": 2, "micro_batch": 2, "global_batch": 2}
    entrypoint.run(base_settings(settings, base_checkpoint) | changes)
    saved = read_checkpoint(tmp_path / "work" / "final.pt")
    assert saved.weights["pos.weight"].shape == (64, 16)
    assert {float(m["step"]) for m in saved.optimizer_by_name().values()} == {4.0}


def without_moments(checkpoint: Path, path: Path, **meta: Any) -> Path:
    """A checkpoint that tells of its trained rows by its metadata, or not at all."""
    payload = torch.load(checkpoint, weights_only=True)
    torch.save({"model": payload["model"], "step": 100, "meta": meta}, path)
    return path


def test_the_context_that_the_metadata_tells_counts_as_trained(
    settings: Settings, base_checkpoint: Path, tmp_path: Path
) -> None:
    source = without_moments(base_checkpoint, tmp_path / "told.pt", block_size=16)
    entrypoint.run(base_settings(settings, source) | {"train_steps": 1, "lr_peak": 1e-12})
    saved = read_checkpoint(tmp_path / "work" / "final.pt")
    table = torch.load(base_checkpoint, weights_only=True)["model"]["pos.weight"]
    expected = resize_positions(table, 16, 32)
    assert torch.allclose(saved.weights["pos.weight"][:32], expected, atol=1e-6)


def test_the_rows_that_the_user_tells_are_the_context_before(
    settings: Settings, base_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    source = without_moments(base_checkpoint, tmp_path / "untold.pt")
    entrypoint.run(
        base_settings(settings, source)
        | {"trained_positions": 16, "reset_optim_on_ctx_change": True, "train_steps": 103}
        | {"save_every": 1000, "eval_every": 1000, "eval_max_tokens": 64}
    )
    assert "context 16 -> 32: step 0, fresh optimizer" in caplog.text


def test_a_scale_for_rotary_positions_is_refused_for_learned_ones(
    settings: Settings, base_checkpoint: Path
) -> None:
    fails(base_settings(settings, base_checkpoint), 2, "has learned positions", rope_scale=2.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, [0.2, 3.0]), ({"alpha": 0.9}, [0.9, 3.0]), ({"T": 1.5}, [0.2, 1.5])],
    ids=["the schedules", "alpha", "T"],
)
def test_a_constant_of_the_user_ends_the_schedule_of_a_checkpoint(
    settings: Settings, tmp_path: Path, given: dict[str, float], expected: list[float]
) -> None:
    annealed = {"alpha_schedule": "0:0.7,3:0.2", "temp_schedule": "0:2.0,3:3.0"}
    entrypoint.run(settings | annealed | {"train_steps": 4, "save_every": 2})
    phase = settings | given | {"resume_gcs_uri": str(tmp_path / "work" / "ckpt_step_2.pt")}
    entrypoint.run(phase | {"local_workdir": str(tmp_path / "more"), "train_steps": 5})
    meta = read_checkpoint(tmp_path / "more" / "final.pt").meta
    assert [meta["kd_alpha"], meta["kd_temperature"]] == expected


def test_a_bare_state_dict_starts_a_run(
    settings: Settings, base_checkpoint: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare.pt"
    torch.save(torch.load(base_checkpoint, weights_only=True)["model"], bare)
    result = entrypoint.run(base_settings(settings, bare) | {"train_steps": 1})
    assert result is not None
    assert result.step == 1


def test_a_step_below_train_steps_is_kept(settings: Settings, tmp_path: Path) -> None:
    entrypoint.run(settings | {"train_steps": 4, "save_every": 2})
    cut = str(tmp_path / "work" / "ckpt_step_2.pt")
    more = settings | {"local_workdir": str(tmp_path / "more"), "resume_gcs_uri": cut}
    entrypoint.run(more | {"train_steps": 3, "save_every": 1})
    assert (tmp_path / "more" / "ckpt_step_3.pt").exists()
    assert not (tmp_path / "more" / "ckpt_step_1.pt").exists()


def test_the_checkpoints_batch_decides_what_a_micro_batch_must_divide(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    entrypoint.run(settings | {"global_batch": 10, "micro_batch": 5, "train_steps": 2})
    phase = settings | {
        "local_workdir": str(tmp_path / "more"),
        "resume_gcs_uri": str(tmp_path / "work" / "final.pt"),
        "micro_batch": 10,
        "train_steps": 1,
    }
    del phase["global_batch"]
    entrypoint.run(phase)  # the default of 64 would leave a remainder
    meta = read_checkpoint(tmp_path / "more" / "final.pt").meta
    assert (meta["global_batch"], meta["grad_accum"]) == (10, 1)
    assert "global_batch = 10 (checkpoint)" in caplog.text
    assert "grad_accum = 1 (derived)" in caplog.text
    other = phase | {"local_workdir": str(tmp_path / "derived"), "grad_accum": 2}
    entrypoint.run(other | {"micro_batch": 2})
    assert "global_batch = 4 (derived)" in caplog.text
    left_out = phase | {"local_workdir": str(tmp_path / "fits"), "train_steps": 0}
    del left_out["micro_batch"]
    caplog.clear()
    entrypoint.run(left_out)  # 8 windows would leave a remainder, and 5 are the most that do not
    assert "micro_batch = 5 (derived)" in caplog.text
    assert "grad_accum = 2 (derived)" in caplog.text
    fails(phase | {"local_workdir": str(tmp_path / "other")}, 2, "--global_batch=10", micro_batch=3)


def test_a_schedule_ends_with_the_phase_that_counted_its_steps(
    settings: Settings, tmp_path: Path
) -> None:
    """Kept where the step is kept; else alpha and T go on from the values they had reached."""
    annealed = {"alpha_schedule": "0:0.7,2:0.4,4:0.2", "temp_schedule": "0:2.0,3:1.5"}
    entrypoint.run(settings | annealed)
    source = tmp_path / "work"

    def next_phase(name: str, checkpoint: str, **changes: Any) -> dict[str, Any]:
        place = {"local_workdir": str(tmp_path / name), "resume_gcs_uri": str(source / checkpoint)}
        entrypoint.run(settings | place | changes)
        return read_checkpoint(tmp_path / name / "final.pt").meta

    kept = next_phase("kept", "ckpt_step_3.pt")
    assert (kept["alpha_schedule"], kept["kd_alpha"], kept["kd_temperature"]) == (
        "0:0.7,2:0.4,4:0.2",
        0.2,
        1.5,
    )
    restarted = next_phase("restarted", "final.pt", train_steps=2)
    assert (restarted["alpha_schedule"], restarted["kd_alpha"]) == ("", 0.2)
    assert (restarted["temp_schedule"], restarted["kd_temperature"]) == ("", 1.5)
    given = next_phase("given", "final.pt", train_steps=2, alpha_schedule="0:0.9")
    assert (given["kd_alpha"], given["kd_temperature"]) == (0.9, 1.5)


def test_rotary_students_train_and_continue_with_scaled_positions(
    settings: Settings, tmp_path: Path
) -> None:
    entrypoint.run(settings | {"pos_embedding": "rotary", "eval_ctx_lens": (32, 64)})
    source = str(tmp_path / "work" / "best.pt")
    more = {"block_size": 64, "rope_scale": 2.0, "reset_optim_on_ctx_change": True}
    result = entrypoint.run(
        settings | more | {"resume_gcs_uri": source, "local_workdir": str(tmp_path / "long")}
    )
    assert result is not None
    meta = read_checkpoint(tmp_path / "long" / "final.pt").meta
    assert meta["pos_embedding"]["type"] == "rotary"
    assert meta["rope_scale"] == 2.0
    assert result.step == 6


# ── own snapshots


def test_another_runs_location_is_refused_naming_what_differs(settings: Settings) -> None:
    entrypoint.run(settings | {"train_steps": 2})
    with pytest.raises(UsageError) as caught:
        entrypoint.run(settings | {"train_steps": 2, "lr_peak": 5e-3, "seed": 1})
    message = str(caught.value)
    assert "holds another run" in message
    assert "lr_peak 0.001 -> 0.005" in message
    assert "seed 42 -> 1" in message


def test_own_progress_is_preferred_over_the_resume_uri(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.set_up_logging()
    entrypoint.run(settings | {"local_workdir": str(tmp_path / "source"), "train_steps": 3})
    source = str(tmp_path / "source" / "final.pt")
    phase = settings | {"resume_gcs_uri": source, "train_steps": 2, "save_every": 1}
    entrypoint.run(phase)
    (tmp_path / "work" / "final.pt.meta.json").unlink()
    (tmp_path / "work" / "ckpt_step_2.pt.meta.json").unlink()
    for path in (tmp_path / "work").glob("*best*"):
        path.unlink()
    shutil.rmtree(tmp_path / "source")
    result = entrypoint.run(phase)
    assert result is not None
    assert result.step == 2
    entrypoint.run(phase | {"resume_gcs_uri": str(tmp_path / "another.pt")})
    assert f"started from {source}, not from --resume_gcs_uri=" in capsys.readouterr().err


def test_a_location_that_cannot_be_read_is_not_taken_for_an_empty_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started over, the run would write over its own best checkpoint."""
    entrypoint.run(settings | {"train_steps": 2})
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}

    def unreadable(self: LocalLocation, name: str, *, limit: int) -> bytes:
        raise StorageError(f"reading {name!r} failed: 503 after 60 s")

    with monkeypatch.context() as patched:
        patched.setattr(LocalLocation, "read_bytes", unreadable)
        fails(settings | {"train_steps": 2}, 1, "503 after 60 s")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")} == before


def test_a_stop_before_the_first_update_changes_nothing(settings: Settings, tmp_path: Path) -> None:
    """No evaluation comes of it that the unbroken run has not made."""
    unbroken = settings | {"local_workdir": str(tmp_path / "unbroken")}
    entrypoint.run(unbroken)
    # What a signal during the first update saves: step 0, and nothing evaluated
    payload = torch.load(tmp_path / "unbroken" / "final.pt", weights_only=True)
    resolved = with_accumulation(resolve(settings, {}), 1)
    start = from_scratch(resolved, payload["model"]["embed.weight"].shape[0])
    student = start.student
    snapshot = Snapshot(
        student.state_dict(),
        build_optimizer(student, resolved.config).state_dict(),
        {},
        0,
        {"best_value": math.inf, "best_step": -1, "metrics_step": -1}
        | {"optimizer_names": payload["trainer_state"]["optimizer_names"]},
        build_meta(
            resolved.config,
            student.config,
            step=0,
            trained_positions=32,
            metrics={},
            metrics_step=-1,
        ),
    )
    snapshot.write(tmp_path / "work" / "ckpt_step_0.pt")
    entrypoint.run(settings)
    names = {path.name for path in (tmp_path / "unbroken").glob("*.pt")}
    assert {path.name for path in (tmp_path / "work").glob("*.pt")} == names | {"ckpt_step_0.pt"}
    ended = read_checkpoint(tmp_path / "work" / "final.pt")
    for name, value in read_checkpoint(tmp_path / "unbroken" / "final.pt").weights.items():
        assert torch.equal(value, ended.weights[name])


def test_a_run_of_an_earlier_release_goes_on(settings: Settings, tmp_path: Path) -> None:
    """It did not know a setting whose default is what it did."""
    entrypoint.run(settings | {"train_steps": 2})
    path = tmp_path / "work" / "final.pt"
    payload = torch.load(path, weights_only=True)
    del payload["meta"]["settings"]["kd_scheme"]
    Snapshot(
        *(payload[key] for key in ("model", "optimizer", "scheduler", "step")),
        payload["trainer_state"],
        payload["meta"],
    ).write(path)
    assert entrypoint.run(settings | {"train_steps": 2}) is not None
    other = settings | {"train_steps": 2, "kd_scheme": "jsd"}
    fails(other, 2, "kd_scheme 'forward_kl' -> 'jsd'")
    fails(
        settings | {"train_steps": 2, "resume_gcs_uri": "x.pt", "kd_scheme": "jsd"},
        2,
        "holds another run",
    )


def test_the_log_says_where_each_setting_came_from(settings: Settings) -> None:
    settings = {name: value for name, value in settings.items() if name != "local_workdir"}
    done = command(*flags(settings, train_steps=0))
    said = messages(done.stderr)
    assert any(line.startswith("local_workdir = ") and "(default)" in line for line in said)
    assert any(line.startswith("grad_accum = 1 (derived)") for line in said)
    assert any(line.startswith("d_model = 32 (command line)") for line in said)


def test_a_damaged_newest_snapshot_is_passed_over(settings: Settings, tmp_path: Path) -> None:
    entrypoint.run(settings | {"save_every": 2})
    whole = read_checkpoint(tmp_path / "work" / "final.pt")
    for name in ("final.pt", "best.pt", "ckpt_step_6.pt"):
        path = tmp_path / "work" / name
        path.write_bytes(path.read_bytes()[:-50])
    for path in (tmp_path / "work").glob("ckpt_best*"):
        path.unlink()
    entrypoint.run(settings | {"save_every": 2})
    again = read_checkpoint(tmp_path / "work" / "final.pt")
    assert all(torch.equal(whole.weights[n], again.weights[n]) for n in whole.weights)


# ── errors


def test_usage_errors_are_one_line_and_status_2(settings: Settings) -> None:
    done = command("--alpha_schedule=0:0.7,4x0:0.5", "--block_size=512")
    assert done.returncode == 2
    assert messages(done.stderr) == [
        "--alpha_schedule='0:0.7,4x0:0.5': entry 2 ('4x0:0.5'), 'x' at character 8: a step is a"
        " whole number; updates count from 0"
    ]
    assert done.stdout == ""


def test_failures_are_one_line_and_status_1(settings: Settings, tmp_path: Path) -> None:
    done = command(*flags(settings, resume_gcs_uri=str(tmp_path / "absent.pt")))
    assert done.returncode == 1
    assert "absent.pt" in messages(done.stderr)[-1]
    assert "Traceback" not in done.stderr


def fails(settings: Settings, status: int, *parts: str, **changes: Any) -> None:
    from trainer.runtime.errors import LiquidError

    with pytest.raises(LiquidError) as caught:
        entrypoint.run({k: v for k, v in (settings | changes).items() if v is not None})
    message = str(caught.value)
    assert caught.value.exit_status == status, message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def test_settings_that_do_not_fit_the_models(
    settings: Settings, tmp_path: Path, tokenizer_dir: Path, base_checkpoint: Path
) -> None:
    fails(settings, 2, "--block_size=128 is over the 64 positions of teacher", block_size=128)
    fails(settings, 2, "missing: --teacher_name", teacher_name=None)
    fails(settings, 2, "did you mean val_loss_student@32?", save_best_on="val_loss_studnt@32")
    fails(settings, 2, "--trained_positions=16 is of a checkpoint's table", trained_positions=16)
    small = save_teacher(tmp_path / "small", tokenizer_dir, vocab=512, positions=64)
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    fails(
        settings,
        1,
        "vocabulary of 500 is smaller than the student's of 512",
        teacher_name=str(small),
    )
    resumed = base_settings(settings, base_checkpoint)
    fails(resumed, 2, "--d_model=64", "has 16; leave it out", d_model=64)
    fails(resumed, 2, "--pos_embedding=rotary", pos_embedding="rotary")
    fails(resumed, 2, "--trained_positions=500", trained_positions=500)
    fails(resumed, 1, "which 3 heads do not divide", n_heads=3, d_model=None)


def test_heads_that_the_checkpoint_contradicts(settings: Settings, tmp_path: Path) -> None:
    """Other heads would be another function of the same weights."""
    entrypoint.run(settings)
    resumed = settings | {"resume_gcs_uri": str(tmp_path / "work" / "best.pt")}
    resumed |= {"local_workdir": str(tmp_path / "other")}
    fails(resumed, 2, "--n_heads=2: the checkpoint", "has 4; leave it out", n_heads=2)


def test_shapes_come_from_the_checkpoint_whatever_the_defaults(
    settings: Settings, tmp_path: Path
) -> None:
    """Five heads do not divide the default width."""
    entrypoint.run(settings | {"d_model": 40, "n_heads": 5})
    dropped = {name: value for name, value in settings.items() if name[:2] not in ("d_", "n_")}
    place = {"local_workdir": str(tmp_path / "next"), "train_steps": 2}
    resumed = {"resume_gcs_uri": str(tmp_path / "work" / "final.pt")}
    assert entrypoint.run(dropped | place | resumed) is not None
    meta = read_checkpoint(tmp_path / "next" / "final.pt").meta
    assert (meta["model"]["d_model"], meta["model"]["n_heads"]) == (40, 5)
    assert (meta["settings"]["d_model"], meta["settings"]["n_layers"]) == (40, 2)
    assert entrypoint.run(dropped | place | resumed) is not None, "it is the same run"


def test_metadata_that_cannot_work_names_the_file(settings: Settings, tmp_path: Path) -> None:
    entrypoint.run(settings)
    path = tmp_path / "work" / "final.pt"
    payload = torch.load(path, weights_only=True)
    resumed = settings | {"local_workdir": str(tmp_path / "next")}
    for key, value in {"kd_alpha": 7, "seed": -1, "alpha_schedule": "0:2"}.items():
        torch.save(payload | {"meta": payload["meta"] | {key: value}}, tmp_path / "lies.pt")
        fails(
            resumed,
            1,
            f"{tmp_path / 'lies.pt'}: its metadata cannot work: --",
            resume_gcs_uri=str(tmp_path / "lies.pt"),
        )


def test_a_run_without_a_finite_evaluation_fails(settings: Settings, tmp_path: Path) -> None:
    broken = settings | {"lr_peak": 1e18, "warmup_steps": 0, "max_nonfinite": 100}
    for _ in range(2):  # started again, it has nothing to do and still no best checkpoint
        fails(broken, 1, "gave a finite val_loss_student", "give a smaller --lr_peak than 1e+18")
    assert (tmp_path / "work" / "final.pt").exists()
    assert not (tmp_path / "work" / "best.pt").exists()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "work" / "final.pt.meta.json").read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["val_loss_student"] is None


def test_a_student_of_another_vocabulary(settings: Settings, tmp_path: Path) -> None:
    torch.save(base_package_payload(trained=32, rows=64)["model"], tmp_path / "small.pt")
    resumed = base_settings(settings, tmp_path / "small.pt")
    resumed["cache_dir"] = str(tmp_path / "cache")
    for steps in (0, 1):
        message = "has a vocabulary of 64, the tokenizer one of 512"
        fails(resumed, 1, message, train_steps=steps)
    assert not (tmp_path / "cache").exists(), "the data set was tokenized before"


def test_a_teacher_that_cannot_be_loaded_ends_the_run_before_training(
    settings: Settings, teacher_dir: Path, tmp_path: Path
) -> None:
    fails(
        settings, 1, "teacher '/no/such/teacher' cannot be loaded", teacher_name="/no/such/teacher"
    )
    broken = tmp_path / "broken"
    shutil.copytree(teacher_dir, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    fails(settings, 1, f"teacher '{broken}' cannot be loaded", teacher_name=str(broken))
    weights.unlink()
    fails(settings, 1, f"teacher '{broken}' cannot be loaded", teacher_name=str(broken))
    assert not list((tmp_path / "work").glob("*.pt")), "nothing was trained"


def test_an_output_that_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    fails(settings, 1, str(tmp_path / "file"), output_gcs_uri=str(tmp_path / "file" / "out"))


def test_config_file_errors_name_the_nearest_setting(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("alpha_shedule: '0:0.5'\n")
    done = command(f"--config={path}")
    assert done.returncode == 2
    assert "unknown setting 'alpha_shedule'; did you mean 'alpha_schedule'?" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_config_file_and_flags_together(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    lines = {**settings, "train_steps": 1, "output_gcs_uri": str(tmp_path / "out-$(date +%Y)")}
    path.write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in lines.items()))
    entrypoint.main([f"--config={path}", "--train_steps=2"])
    (output,) = tmp_path.glob("out-2*")
    assert read_checkpoint(output / "final.pt").step == 2
    # Another start may be at another time
    assert f"--output_gcs_uri is {output} for this start; to go on" in capsys.readouterr().err
    entrypoint.main([f"--config={path}", "--train_steps=2", f"--output_gcs_uri={output}"])
    assert "for this start" not in capsys.readouterr().err
