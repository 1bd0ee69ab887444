"""Runs from stored targets: as from the teacher itself, exact in going on, and what is refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.faults.proxy import FaultProxy
from tests.trainer.samples import save_student, save_teacher
from trainer import entrypoint, prepare_tokens, teacher_targets
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.metadata import summary
from trainer.checkpoints.reading import read_checkpoint
from trainer.data.batches import BatchSampler
from trainer.data.streams import open_streams
from trainer.models.teacher import Teacher
from trainer.runtime.errors import DataError, LiquidError, ModelError, UsageError
from trainer.settings.config import TargetSettings, TrainConfig
from trainer.storage.places import open_location
from trainer.targets.reading import Targets
from trainer.targets.shards import Index, read_index
from trainer.training import step

Settings = dict[str, Any]


@pytest.fixture
def taught(settings: Settings, tokens_dir: Path) -> Settings:
    """A run of both schedules with the teacher itself."""
    del settings["dataset_name"]
    return settings | {
        "tokens_dir": str(tokens_dir),
        "train_steps": 8,
        "save_every": 2,
        "eval_every": 4,
        "eval_ctx_lens": (16,),
        "alpha_schedule": "0:0.7,3:0.5,6:0.2",
        "temp_schedule": "0:1.5,5:1.0",
    }


@pytest.fixture
def cached(taught: Settings, targets_dir: Path) -> Settings:
    """The same from targets, which alone name the teacher."""
    del taught["teacher_name"]
    return taught | {"teacher_targets": str(targets_dir)}


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the teacher is loaded")

    monkeypatch.setattr(Teacher, "__init__", refuse)


def final(workdir: Path) -> Checkpoint:
    return read_checkpoint(workdir / "final.pt")


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, second.weights[name]), name
    assert first.meta["metrics"] == second.meta["metrics"]
    assert first.step == second.step


@pytest.mark.soak
def test_large_records_train_as_the_teacher_does(
    taught: Settings, cached: Settings, teacher_dir: Path, tokens_dir: Path, tmp_path: Path
) -> None:
    """With room for half of the vocabulary at every token the estimates are close.

    The gradient is the teacher's but for 15 %; with the targets of other tokens than a window's
    own, it would be another altogether.
    """
    config = TrainConfig(
        teacher_name=str(teacher_dir),
        tokens_dir=str(tokens_dir),
        local_workdir=str(tmp_path / "make"),
        eval_ctx_lens=(16, 32),
    )
    settings = TargetSettings(target_temperatures=(1.0, 1.5), target_bytes=1024, teacher_context=32)
    teacher_targets.run(config, settings, str(tmp_path / "large"))
    once = {"train_steps": 1, "global_batch": 64, "micro_batch": 16, "alpha_schedule": "0:1.0"}
    teacher = {"teacher_name": str(teacher_dir), "local_workdir": str(tmp_path / "one")}
    targets = {"teacher_targets": str(tmp_path / "large"), "local_workdir": str(tmp_path / "two")}
    entrypoint.run(taught | once | teacher)
    entrypoint.run(cached | once | targets)
    ours, theirs = (final(tmp_path / name).optimizer_by_name() for name in ("one", "two"))
    for name, moments in ours.items():
        # After one update, a tenth of the gradient
        gradient, estimate = moments["exp_avg"], theirs[name]["exp_avg"]
        assert float((gradient - estimate).norm()) < 0.3 * float(gradient.norm()), name


@pytest.mark.usefixtures("no_teacher")
def test_a_run_without_the_teacher(
    cached: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture, targets_dir: Path
) -> None:
    """Its metadata names teacher and targets; its evaluations have the teacher's losses."""
    caplog.set_level(logging.INFO)
    entrypoint.run(cached | {"eval_ctx_lens": (16, 24)})
    meta, index = final(tmp_path / "work").meta, read_index(str(targets_dir))
    assert meta["teacher_targets"] == index.fingerprint
    assert meta["teacher_name"] == meta["tokenizer"] == index.made.teacher
    assert summary(meta)["teacher_targets"] == index.fingerprint
    stored = np.frombuffer((targets_dir / "validation.bin").read_bytes(), dtype="<f4")
    rows = dict(zip(index.made.contexts, stored.reshape(3, -1), strict=True))
    for context in (16, 32):
        expected = -float(rows[context].mean(dtype=np.float64))
        assert meta["metrics"][f"val_loss_teacher@{context}"] == pytest.approx(expected)
    assert meta["metrics"]["val_loss_teacher"] == meta["metrics"]["val_loss_teacher@32"]
    assert "val_loss_student@24" in meta["metrics"]
    assert "val_loss_teacher@24" not in meta["metrics"]
    told = [line for line in caplog.messages if "no losses of the teacher at context 24" in line]
    assert len(told) == 1
    assert any(
        line.startswith("teacher_name = ") and "(derived)" in line for line in caplog.messages
    )


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("changes", [{}, {"micro_batch": 2, "dropout": 0.1}], ids=str)
def test_a_run_whose_later_half_was_lost_goes_on_bit_for_bit(
    cached: Settings, tmp_path: Path, changes: Settings
) -> None:
    cached |= changes
    entrypoint.run(cached | {"local_workdir": str(tmp_path / "whole")})
    entrypoint.run(cached)
    for path in (tmp_path / "work").glob("*"):
        if path.is_file() and "ckpt_step_2.pt" not in path.name:
            path.unlink()
    entrypoint.run(cached)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "work"))


def test_accumulation_and_the_search_for_a_micro_batch_change_nothing(
    cached: Settings, tmp_path: Path
) -> None:
    cached |= {"global_batch": 8, "micro_batch": 8}
    entrypoint.run(cached | {"local_workdir": str(tmp_path / "whole")})
    for number, size in enumerate((2, 0)):
        place = tmp_path / str(number)
        entrypoint.run(cached | {"micro_batch": size, "local_workdir": str(place)})
        for name, tensor in final(tmp_path / "whole").weights.items():
            torch.testing.assert_close(tensor, final(place).weights[name], rtol=1e-4, atol=5e-6)


def test_two_processes_read_their_own_windows(
    cached: Settings, tmp_path: Path, gcs_bucket: str, targets_dir: Path
) -> None:
    """From a bucket, which the first of them copies."""
    location = open_location(f"{gcs_bucket}/targets")
    for path in targets_dir.glob("[!.]*"):
        location.put(path, path.name)
    entrypoint.run(cached | {"local_workdir": str(tmp_path / "one")})
    flags = cached | {
        "teacher_targets": location.uri,
        "local_workdir": str(tmp_path / "two"),
        "micro_batch": 2,
        "eval_ctx_lens": "16",
    }
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--log-dir=/dev/null"),
        *("-m", "trainer.entrypoint", *(f"--{name}={value}" for name, value in flags.items())),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = final(tmp_path / "one"), final(tmp_path / "two")
    for name, tensor in ours.weights.items():
        torch.testing.assert_close(tensor, theirs.weights[name], rtol=1e-4, atol=5e-6)
    for name, value in ours.meta["metrics"].items():
        assert value == pytest.approx(theirs.meta["metrics"][name], rel=1e-5), name


def test_each_update_decodes_at_its_own_temperature(
    cached: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And reads nothing of the targets in updates without a distillation term."""
    seen: list[tuple[float, float, float | None]] = []
    real = step.sparse_distill_loss
    index = read_index(cached["teacher_targets"])
    flat = float(np.log(index.made.vocabulary))

    def spy(hidden: Tensor, head: Tensor, targets: Any, labels: Tensor, mix: Any) -> Any:
        seen.append((mix.alpha, mix.temperature, float(targets.negentropy.mean())))
        return real(hidden, head, targets, labels, mix)

    monkeypatch.setattr(step, "sparse_distill_loss", spy)
    entrypoint.run(cached | {"alpha_schedule": "0:0.7,3:0.5,6:0.0", "eval_every": 100})
    assert [pair[:2] for pair in seen] == [(0.7, 1.5)] * 3 + [(0.5, 1.5)] * 2 + [(0.5, 1.0)]
    warm = [value for _, temperature, value in seen if temperature == 1.5 and value is not None]
    assert max(warm) < (seen[-1][2] or 0.0) - 0.05, "a higher temperature has more entropy"
    assert -flat < min(warm)


def test_alpha_zero_throughout_needs_no_targets(
    cached: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("targets are opened")

    monkeypatch.setattr(Targets, "__init__", refuse)
    entrypoint.run(cached | {"alpha_schedule": "", "alpha": 0.0, "T": 7.0})
    assert final(tmp_path / "work").meta["teacher_targets"] is None


# ── what does not fit


def refused(settings: Settings, kind: type[LiquidError], message: str) -> None:
    """One line, and nothing is written."""
    work = Path(settings["local_workdir"])
    before = {str(path): path.stat().st_mtime_ns for path in work.rglob("*")}
    with pytest.raises(kind, match=message) as caught:
        entrypoint.run(settings)
    assert "\n" not in str(caught.value)
    assert {str(path): path.stat().st_mtime_ns for path in work.rglob("*")} == before


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 24}, "--block_size=24 does not divide the teacher's context of 64 tokens"),
        ({"block_size": 128}, "--block_size=128 does not divide the teacher's context of 64"),
        ({"temp_schedule": "0:1.5,5:1.2,7:1.1"}, "T 1.1, 1.2 is not among the temperatures"),
        ({"temp_schedule": "", "T": 3.0}, "T 3 is not among .*, which were made for 1, 1.5;"),
        ({"kd_scheme": "jsd"}, "--kd_scheme=jsd needs the teacher itself"),
        ({"teacher_targets": ""}, "missing: --teacher_name"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(cached: Settings, changes: Settings, message: str) -> None:
    refused(cached | changes, UsageError, message)


def test_temperatures_of_updates_without_the_teacher_do_not_matter(cached: Settings) -> None:
    """Neither those past the last step."""
    schedules = {"temp_schedule": "0:1.5,4:9.0,90:8.0", "alpha_schedule": "0:0.5,4:0.0,80:1.0"}
    assert entrypoint.run(cached | schedules | {"eval_every": 100}) is not None


def test_there_must_be_whole_targets(cached: Settings, tmp_path: Path, targets_dir: Path) -> None:
    partial = Path(shutil.copytree(targets_dir, tmp_path / "partial"))
    (partial / "targets.json").unlink()
    for place in (tmp_path / "none", partial):
        refused(
            cached | {"teacher_targets": str(place)},
            DataError,
            "there are no whole teacher targets",
        )
    (partial / "targets.json").write_text("{}")
    refused(cached | {"teacher_targets": str(partial)}, DataError, "is of format None, not 1")


def test_targets_of_other_tokens(
    cached: Settings, texts: list[str], tokenizer_dir: Path, tmp_path: Path, tokens_dir: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, part in (("train", texts[4:6]), ("validation", texts[-1:])):
        lines = (json.dumps({"text": text}) for text in part)
        (source / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = TrainConfig(
        teacher_name=str(tokenizer_dir),
        dataset_name=str(source),
        local_workdir=str(tmp_path / "prepare"),
    )
    prepare_tokens.run(config, str(tmp_path / "tokens"))
    with pytest.raises(DataError, match="the targets are of other tokens .fingerprint"):
        entrypoint.run(cached | {"tokens_dir": str(tmp_path / "tokens")})
    other = Path(shutil.copytree(tokens_dir, tmp_path / "other"))
    described = json.loads((other / "tokens.json").read_bytes())
    described["tokenizer_fingerprint"] = "0" * 24
    (other / "tokens.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="tokens of another tokenizer"):
        entrypoint.run(cached | {"tokens_dir": str(other)})


def test_the_teacher_may_be_named_and_is_compared(
    cached: Settings, teacher_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """By its weights: under another name it is the same."""
    copy = shutil.copytree(teacher_dir, tmp_path / "copy")
    assert entrypoint.run(cached | {"teacher_name": str(copy), "train_steps": 1}) is not None
    other = save_teacher(tmp_path / "other", tokenizer_dir, vocab=520, positions=32)
    fresh = cached | {"local_workdir": str(tmp_path / "fresh")}
    for name, message in (
        (other, "which is not --teacher_name='.*other'"),
        (tmp_path / "none", "not '.*none', which cannot be compared with it .*no such directory"),
    ):
        refused(fresh | {"teacher_name": str(name)}, UsageError, message)


def test_a_teacher_that_is_out_of_reach_is_known_by_its_name(
    cached: Settings, targets_dir: Path, tmp_path: Path
) -> None:
    """As where a machine without network trains from targets of a hub's teacher."""
    copy = Path(shutil.copytree(targets_dir, tmp_path / "targets"))
    index = read_index(str(copy))
    away = Index(replace(index.made, teacher="/far/teacher"), index.files)
    (copy / "targets.json").write_bytes(away.dump(str(copy)))
    named = cached | {"teacher_targets": str(copy), "teacher_name": "/far/teacher"}
    # What the windows were made with is another thing then, as their checksums say
    with pytest.raises(DataError, match="do not have their checksum"):
        entrypoint.run(named)


def test_another_vocabulary(cached: Settings, tmp_path: Path) -> None:
    save_student(tmp_path / "foreign.pt", vocab_size=520)
    del cached["d_model"], cached["n_layers"], cached["n_heads"]
    refused(
        cached | {"resume_gcs_uri": str(tmp_path / "foreign.pt")},
        ModelError,
        "foreign.pt has a vocabulary of 520, and the targets are over 512",
    )


def test_a_run_goes_on_with_what_it_began_with(
    cached: Settings, targets_dir: Path, teacher_dir: Path, tokens_dir: Path, tmp_path: Path
) -> None:
    """Targets that were moved are the same; others, or the teacher, are not."""
    entrypoint.run(cached | {"train_steps": 8})
    for name in ("final.pt", "final.pt.meta.json"):
        (tmp_path / "work" / name).unlink()
    online = {name: value for name, value in cached.items() if name != "teacher_targets"}
    online |= {"teacher_name": str(teacher_dir)}
    refused(online, UsageError, "holds a run from the targets of .*, not from the teacher")
    config = TrainConfig(
        teacher_name=str(teacher_dir),
        tokens_dir=str(tokens_dir),
        local_workdir=str(tmp_path / "make"),
        eval_ctx_lens=(16, 32),
        seed=7,
    )
    settings = TargetSettings(target_temperatures=(1.0, 1.5))
    teacher_targets.run(config, settings, str(tmp_path / "others"))
    refused(
        cached | {"teacher_targets": str(tmp_path / "others")},
        UsageError,
        "not from the targets of fingerprint .*; give --teacher_targets with those, or another",
    )
    moved = shutil.copytree(targets_dir, tmp_path / "moved")
    assert entrypoint.run(cached | {"teacher_targets": str(moved)}) is not None
    again = online | {"local_workdir": str(tmp_path / "online"), "train_steps": 2}
    entrypoint.run(again)
    targets = {"teacher_targets": str(targets_dir)}
    refused(again | targets, UsageError, "from the teacher itself, not from the targets")


def test_damage_that_is_met_on_the_way_ends_the_run_after_saving(
    cached: Settings, targets_dir: Path, tokens_dir: Path, tmp_path: Path
) -> None:
    """In one line; with whole targets, the run goes on as if nothing had been."""
    cached |= {"save_every": 1000, "eval_every": 1000, "train_steps": 40}
    entrypoint.run(cached | {"local_workdir": str(tmp_path / "whole")})
    index = read_index(str(targets_dir))
    sampler = BatchSampler(
        open_streams(tokens_dir).train,
        block_size=32,
        global_batch=4,
        micro_batch=4,
        seed=42,
    )
    seen = {int(n) * 32 // 64 for k in range(20) for n in sampler.window_indices(k, 0)}
    bad = next(
        int(n) * 32 // 64
        for k in range(20, 40)
        for n in sampler.window_indices(k, 0)
        if int(n) * 32 // 64 not in seen
    )
    damaged = Path(shutil.copytree(targets_dir, tmp_path / "damaged"))
    data = bytearray((damaged / "train-00000.bin").read_bytes())
    data[bad * (64 * index.made.record_bytes + 4) + 100] ^= 4
    (damaged / "train-00000.bin").write_bytes(data)
    with pytest.raises(DataError, match="do not have their checksum") as caught:
        entrypoint.run(cached | {"teacher_targets": str(damaged)})
    assert "\n" not in str(caught.value)
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(snapshot).step >= 20
    entrypoint.run(cached)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "work"))


@pytest.mark.soak
def test_a_stop_while_the_bucket_is_silent_saves_the_last_update(
    cached: Settings, targets_dir: Path, tmp_path: Path, gcs_bucket: str, gcs_proxy: FaultProxy
) -> None:
    """The run waits for records that do not come, and does not wait on when it is told to stop."""
    location = open_location(f"{gcs_bucket}/targets")
    for path in targets_dir.glob("[!.]*"):
        location.put(path, path.name)
    flags = cached | {
        "teacher_targets": location.uri,
        "eval_ctx_lens": "16",
        "train_steps": 4000,
        "eval_every": 4000,
        "save_every": 4000,
        "log_interval": 1,
    }
    # No room to copy anything before the bucket falls silent
    script = (
        "from trainer.runtime.signals import watch_signals; watch_signals();"
        "import shutil; from trainer.targets import reading;"
        "reading.shutil.disk_usage = lambda _: shutil._ntuple_diskusage(9, 9, 9);"
        "reading._MOST_AHEAD = 1;"
        "from trainer import entrypoint; from trainer.runtime.commands import run_command;"
        "raise SystemExit(run_command(entrypoint.main))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, *(f"--{name}={value}" for name, value in flags.items())],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if '"step 3/4000' in line:
            break
    gcs_proxy.bandwidth = 1.0
    time.sleep(6.0)  # in which what was read ahead is used up
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == 143, rest[-2000:]
    assert "stopped by SIGTERM at step" in rest
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(snapshot).step >= 3
