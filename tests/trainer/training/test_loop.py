"""The loop: resuming, accumulation, schedules, bad numbers, evaluation, distillation's use."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.metrics.records import lasting_lines
from trainer import entrypoint
from trainer.checkpoints.checkpoint import Checkpoint
from trainer.checkpoints.reading import read_checkpoint
from trainer.data.streams import streams_for
from trainer.loss.chunked import DistillLoss
from trainer.models.student import Student
from trainer.models.teacher import load_teacher, read_teacher_spec
from trainer.runtime.errors import Preempted, StorageError, TrainingError, UsageError
from trainer.runtime.log import set_up_logging
from trainer.runtime.processes import Processes
from trainer.settings.layers import resolve
from trainer.training import evaluation, loop, run, step
from trainer.training.evaluation import Evaluator
from trainer.training.log_window import LogWindow
from trainer.training.loop import TrainingLoop
from trainer.training.precision import Precision, choose_precision
from trainer.training.progress import RunResult
from trainer.training.start import from_scratch
from trainer.training.step import TrainStep

Settings = dict[str, Any]


def train(settings: Settings, **changes: Any) -> RunResult:
    result = entrypoint.run(settings | changes)
    assert result is not None
    return result


def final(workdir: Path) -> Checkpoint:
    return read_checkpoint(workdir / "final.pt")


def assert_same(first: Checkpoint, second: Checkpoint) -> None:
    """Weights, moments and metrics, bit for bit."""
    assert first.weights.keys() == second.weights.keys()
    for name, tensor in first.weights.items():
        assert torch.equal(tensor, second.weights[name]), name
    ours, theirs = first.optimizer_by_name(), second.optimizer_by_name()
    assert ours.keys() == theirs.keys()
    for name, moments in ours.items():
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key], theirs[name][key]), (name, key)
    assert first.meta["metrics"] == second.meta["metrics"]
    assert first.step == second.step


@pytest.mark.parametrize("batches", [{"grad_accum": 1}, {"grad_accum": 3, "dropout": 0.1}])
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    settings: Settings, tmp_path: Path, batches: Settings
) -> None:
    """8 steps against 4 and a resume to 8; both schedules change on either side of the cut."""
    del settings["global_batch"]
    settings |= batches | {
        "train_steps": 8,
        "save_every": 4,
        "eval_every": 4,
        "alpha_schedule": "0:0.7,3:0.5,6:0.2",
        "temp_schedule": "0:1.5,5:1.0",
    }
    train(settings, local_workdir=str(tmp_path / "whole"))
    cut = str(tmp_path / "whole" / "ckpt_step_4.pt")
    train(settings, local_workdir=str(tmp_path / "resumed"), resume_gcs_uri=cut)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "resumed"))


def test_a_run_whose_later_half_was_lost_goes_on_bit_for_bit(
    settings: Settings, tmp_path: Path
) -> None:
    settings |= {"train_steps": 8, "save_every": 2, "eval_every": 4}
    train(settings, local_workdir=str(tmp_path / "whole"))
    train(settings, local_workdir=str(tmp_path / "killed"))
    for path in (tmp_path / "killed").glob("*"):
        if path.is_file() and "ckpt_step_2.pt" not in path.name:
            path.unlink()
    result = train(settings, local_workdir=str(tmp_path / "killed"))
    assert result.step == 8
    assert_same(final(tmp_path / "whole"), final(tmp_path / "killed"))


def test_a_finished_run_started_again_does_nothing(settings: Settings, tmp_path: Path) -> None:
    first = train(settings)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}
    assert train(settings) == first
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.pt")}


def test_accumulation_equals_one_large_batch(settings: Settings, tmp_path: Path) -> None:
    del settings["global_batch"]
    train(settings, grad_accum=4, micro_batch=2, local_workdir=str(tmp_path / "four"))
    train(settings, grad_accum=1, micro_batch=8, local_workdir=str(tmp_path / "one"))
    four, one = final(tmp_path / "four"), final(tmp_path / "one")
    for name, tensor in four.weights.items():
        assert torch.allclose(tensor, one.weights[name], rtol=1e-4, atol=2e-6), name
    for key, value in four.meta["metrics"].items():
        assert value == pytest.approx(one.meta["metrics"][key], rel=1e-5), key


def test_schedules_and_learning_rate_reach_every_update(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both default runs of the pipeline, a hundredth as long, as the loss and AdamW see them."""
    seen: list[tuple[float, float, float]] = []
    original, real_loss = TrainStep.update, step.distill_loss
    mixes: list[Any] = []

    def spy_loss(*args: Any, **kwargs: Any) -> Any:
        mixes.append(args[5])
        return real_loss(*args, **kwargs)

    def spy(self: TrainStep, learning_rate: float) -> torch.Tensor:
        norm = original(self, learning_rate)
        used = {group["lr"] for group in self.optimizer.param_groups}
        seen.append((mixes[-1].alpha, mixes[-1].temperature, used.pop()))
        assert not used
        return norm

    monkeypatch.setattr(step, "distill_loss", spy_loss)
    monkeypatch.setattr(TrainStep, "update", spy)
    train(
        settings,
        train_steps=12,
        warmup_steps=2,
        lr_peak=2.7e-4,
        alpha_schedule="0:0.7,4:0.5,8:0.3",
        temp_schedule="0:1.2,8:1.0",
    )
    assert [alpha for alpha, _, _ in seen] == [0.7] * 4 + [0.5] * 4 + [0.3] * 4
    assert [T for _, T, _ in seen] == [1.2] * 8 + [1.0] * 4
    cosine = [
        2.7e-4 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (k - 2) / 10))) for k in range(2, 12)
    ]
    assert [lr for _, _, lr in seen] == pytest.approx([1.35e-4, 2.7e-4, *cosine])


def test_alpha_zero_runs_no_teacher(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even loaded when alpha is 0 throughout; not called in the updates where it is 0."""
    from trainer.models.teacher import Teacher

    calls: list[int] = []
    original = Teacher.hidden

    def count(self: Teacher, ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape[0])
        return original(self, ids)

    monkeypatch.setattr(Teacher, "hidden", count)
    train(settings, alpha=0.0)
    assert calls == []
    counts = settings | {"eval_every": 100, "local_workdir": settings["local_workdir"] + "-2"}
    train(counts, alpha_schedule="0:1.0,2:0.0", eval_max_tokens=1)
    # One check at loading, two updates, and one evaluation batch at the end
    assert len(calls) == 4


def test_metadata_says_what_the_run_was(settings: Settings, tmp_path: Path) -> None:
    train(settings, alpha_schedule="0:0.7,3:0.5,9:0.1", eval_ctx_lens=(32, 64))
    meta = json.loads((tmp_path / "work" / "best.pt.meta.json").read_text())
    expected = {
        "format_version": 1,
        "step": 6,
        "block_size": 32,
        "kd_alpha": 0.5,
        "kd_temperature": 1.0,
        "alpha_schedule": "0:0.7,3:0.5,9:0.1",
        "temp_schedule": "",
        "pending_schedules": {"alpha": "9:0.1", "T": ""},
        "grad_accum": 1,
        "warmup_steps": 2,
        "train_steps": 6,
        "lr_peak": 1e-3,
        "rope_scale": 1.0,
        "eval_ctx_lens": [32, 64],
        "teacher_name": settings["teacher_name"],
        "tokenizer": settings["teacher_name"],
        "seed": 42,
    }
    assert {key: meta[key] for key in expected} == expected
    assert meta["pos_embedding"] == {
        "type": "absolute",
        "num_embeddings": 32,
        "embedding_dim": 32,
        "trained_positions": 32,
    }
    for who in ("student", "teacher"):
        for context in (32, 64):
            loss = meta["metrics"][f"val_loss_{who}@{context}"]
            assert meta["metrics"][f"val_ppl_{who}@{context}"] == pytest.approx(math.exp(loss))
        assert meta["metrics"][f"val_loss_{who}"] == meta["metrics"][f"val_loss_{who}@32"]
    assert meta["crc32c"]
    assert meta["size"] == (tmp_path / "work" / "best.pt").stat().st_size


def test_evaluation_matches_stock_transformers(settings: Settings, tmp_path: Path) -> None:
    """Both losses at both contexts, recomputed with stock models on the same tokens in fp64."""
    from transformers import AutoModelForCausalLM

    from trainer.models.gpt2.export import gpt2_model

    train(settings, eval_ctx_lens=(16, 32))
    saved = final(tmp_path / "work")
    config = saved.student_config(n_heads=4)
    stock = {
        "student": gpt2_model(saved.weights, config, 32).double(),
        "teacher": AutoModelForCausalLM.from_pretrained(settings["teacher_name"]).double(),
    }
    streams = streams_for(resolve(settings, {}).config)
    tokens = torch.from_numpy(streams.validation[:1001].astype("int64"))
    for who, model in stock.items():
        for context in (16, 32):
            total = 0.0
            for start in range(0, 1000, context):
                piece = tokens[start : start + context + 1]
                with torch.no_grad():
                    logits = model(piece[None, :-1]).logits[0, :, : config.vocab_size]
                total += float(
                    torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum")
                )
            found = saved.meta["metrics"][f"val_loss_{who}@{context}"]
            assert found == pytest.approx(total / 1000, rel=1e-6), (who, context)


def test_contexts_past_the_teacher_are_evaluated_for_the_student_only(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(settings, eval_ctx_lens=(32, 96))
    assert "val_loss_student@96" in result.metrics
    assert "val_loss_teacher@32" in result.metrics
    assert "val_loss_teacher@96" not in result.metrics


def test_contexts_longer_than_the_validation_split(settings: Settings, tmp_path: Path) -> None:
    tokens = len(streams_for(resolve(settings, {}).config).validation)
    message = f"--eval_ctx_lens={tokens + 1} is longer than the validation split of {tokens} tokens"
    with pytest.raises(UsageError, match=message):
        train(settings, eval_ctx_lens=(32, tokens + 1))
    with pytest.raises(UsageError, match="--eval_ctx_lens=1001 is longer than --eval_max_tokens="):
        train(settings, eval_ctx_lens=(32, 1001))
    assert not list((tmp_path / "work").glob("*.pt")), "told before the first update"
    result = train(settings, eval_ctx_lens=(32, tokens), eval_max_tokens=0, train_steps=1)
    assert math.isfinite(result.metrics[f"val_loss_student@{tokens}"])


def test_a_validation_split_shorter_than_the_training_context_is_used(
    settings: Settings, corpus: Path, tmp_path: Path
) -> None:
    source = tmp_path / "corpus"
    source.mkdir()
    (source / "train.jsonl").write_bytes((corpus / "train.jsonl").read_bytes())
    (source / "validation.jsonl").write_text('{"text": "The if statement."}')
    result = train(settings, dataset_name=str(source), train_steps=1)
    assert math.isfinite(result.metrics["val_loss_student@32"])


# ── signals during evaluation


def stop_at_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Send SIGTERM to this process before an evaluation batch; the list fills with all of them."""
    real, seen = evaluation.evaluation_batches, list[int]()

    def watched(*args: Any, **kwargs: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for batch in real(*args, **kwargs):
            seen.append(len(seen) + 1)
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(evaluation, "evaluation_batches", watched)
    return seen


@pytest.mark.parametrize(
    ("batch", "at"), [(3, 3), (12, 3), (19, 6)], ids=["student", "teacher", "last-step"]
)
def test_a_signal_breaks_an_evaluation_off_and_a_resumed_run_makes_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, at: int
) -> None:
    """An evaluation has 8 batches of the student and 8 of the teacher."""
    settings |= {"save_every": 1000}
    train(settings, local_workdir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        seen = stop_at_batch(patched, batch)
        with pytest.raises(Preempted, match=f"stopped by SIGTERM at step {at};") as caught:
            train(settings)
    assert seen[-1] == batch, "none after the signal"
    assert caught.value.exit_status == 143
    (saved,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(saved).meta["metrics_step"] == (-1 if at == 3 else 3)
    result = train(settings)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "work"))
    assert lasting_lines(str(tmp_path / "work")) == lasting_lines(str(tmp_path / "whole"))
    assert (result.best_step, result.metrics) == (
        final(tmp_path / "whole").trainer_state["best_step"],
        final(tmp_path / "whole").meta["metrics"],
    )


def test_a_phase_stopped_at_the_step_it_came_from_still_evaluates_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 of a phase that began at 0, from a checkpoint at step 3."""
    train(settings, local_workdir=str(tmp_path / "before"), train_steps=3)
    source = str(tmp_path / "before" / "final.pt")
    phase = settings | {"resume_gcs_uri": source, "train_steps": 3}
    train(phase, local_workdir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        stop_at_batch(patched, 3)
        with pytest.raises(Preempted, match="at step 3;"):
            train(phase)
    train(phase)
    assert_same(final(tmp_path / "whole"), final(tmp_path / "work"))


def test_a_stop_right_after_a_resume_leaves_the_snapshot_alone(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again, it would have no sidecar for a while, and the process may be killed then."""
    work = tmp_path / "work"
    with monkeypatch.context() as patched:
        stop_at_batch(patched, 3)
        with pytest.raises(Preempted, match=f"its output at {work}, it goes on"):
            train(settings | {"save_every": 1000})
    before = {path.name: path.stat() for path in work.glob("ckpt_*")}
    assert set(before) == {"ckpt_step_3.pt", "ckpt_step_3.pt.meta.json"}
    with monkeypatch.context() as patched:
        stop_at_batch(patched, 1)
        with pytest.raises(Preempted, match="at step 3;"):
            train(settings | {"save_every": 1000})
    after = {path.name: path.stat() for path in work.glob("ckpt_*")}
    assert {name: (one.st_ino, one.st_mtime_ns) for name, one in after.items()} == {
        name: (one.st_ino, one.st_mtime_ns) for name, one in before.items()
    }


def test_a_run_goes_on_where_fp16_is_what_the_machine_has(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine before needed no loss scaling, and saved none."""
    with monkeypatch.context() as patched:
        stop_at_batch(patched, 3)
        with pytest.raises(Preempted, match="at step 3;"):
            train(settings)
    half = Precision(torch.device("cpu"), torch.float16, torch.float32)
    monkeypatch.setattr(run, "choose_precision", lambda *_: half)
    assert train(settings).step == 6
    assert final(tmp_path / "work").trainer_state["loss_scale"]["scale"] > 0


# ── bad numbers


def poison(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Make the loss of some updates not finite, inside the real loop."""
    real, calls = step.distill_loss, iter(range(10_000))

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        output = real(*args, **kwargs)
        bad = next(calls) in steps
        return output._replace(loss=output.loss * float("nan")) if bad else output

    monkeypatch.setattr(step, "distill_loss", poisoned)


def test_a_bad_update_is_skipped_and_counted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(2, 4))
    train(settings)
    state = final(tmp_path / "work").trainer_state
    assert (state["skipped"], state["skipped_in_row"]) == (2, 0)
    assert math.isfinite(state["best_value"])
    steps = {float(m["step"]) for m in final(tmp_path / "work").optimizer_by_name().values()}
    assert steps == {4.0}, "AdamW counts the updates that were made"


def test_the_log_tells_of_what_was_finite_alone() -> None:
    def output(*values: float) -> DistillLoss:
        return DistillLoss(*map(torch.tensor, values))

    window = LogWindow(torch.device("cpu"))
    for loss, ce, kd in ((2.0, 3.0, math.nan), (math.nan, math.inf, math.nan), (4.0, 5.0, 1.0)):
        window.add(output(loss, ce, kd))
    for norm in (math.inf, 0.5, 1.5):
        window.add_norm(torch.tensor(norm))
    assert window.means(Processes()) == {"loss": 3.0, "ce": 4.0, "kd": 1.0, "grad_norm": 1.0}
    window.clear()
    window.add(output(math.nan, math.nan, math.nan))
    window.add_norm(torch.tensor(math.nan))
    assert window.means(Processes()) == {}


def test_repeated_bad_updates_end_the_run_with_the_last_checkpoint_kept(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, range(4, 100))
    with pytest.raises(TrainingError) as caught:
        train(settings, train_steps=30, max_nonfinite=5)
    message = str(caught.value)
    assert "5 updates in a row had a non-finite gradient, the last at step 8" in message
    assert "learning rate" in message
    assert f"the last good checkpoint, of step 6, is kept at {tmp_path / 'work'}" in message
    kept = read_checkpoint(tmp_path / "work" / "ckpt_step_3.pt")
    assert kept.step == 3


def test_weights_that_are_not_finite_are_never_best_nor_saved(
    settings: Settings, tmp_path: Path
) -> None:
    config = resolve(settings | {"grad_accum": 1}, {}).config
    streams = streams_for(config)
    precision = choose_precision(config)
    start = from_scratch(resolve(settings, {}), streams.info.vocab_size)
    assert start.student.pos is not None

    class Unused:
        def save(self, *args: Any) -> None:
            raise AssertionError("nothing is saved")

    run = TrainingLoop(config, start, None, streams, precision, Unused())  # type: ignore[arg-type]
    from trainer.training.scalars import ScalarLog

    scalars = ScalarLog(str(tmp_path))
    with torch.no_grad():
        # A row that evaluation never looks up: the loss stays finite, the weights are not
        unused = set(range(512)) - set(streams.validation[:1001].tolist())
        start.student.embed.weight[unused.pop()] = float("inf")
    assert run._evaluate(scalars) == []
    with pytest.raises(TrainingError, match="not finite after step 0; no checkpoint had been due"):
        run._save(["ckpt_step_0.pt"])
    with torch.no_grad():
        start.student.embed.weight.nan_to_num_(posinf=0.0)
    assert run._evaluate(scalars) != []
    scalars.close()


# ── what distillation and the position resize are good for


@pytest.fixture(scope="module")
def comparison(
    trained_teacher: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """A CE-only and a KD student on equal tokens, from the same seed, beside a trained teacher."""
    corpus, teacher = trained_teacher
    work = tmp_path_factory.mktemp("comparison")
    common = {
        "teacher_name": str(teacher),
        "dataset_name": str(corpus),
        "cache_dir": str(work / "cache"),
        "block_size": 64,
        "d_model": 64,
        "n_layers": 2,
        "n_heads": 4,
        "train_steps": 90,
        "warmup_steps": 9,
        "lr_peak": 3e-3,
        "micro_batch": 16,
        "global_batch": 16,
        "eval_every": 90,
    }
    ce = train(common, alpha=0.0, local_workdir=str(work / "ce"))
    kd = train(common, alpha=0.7, T=1.0, local_workdir=str(work / "kd"))
    return {"ce": ce, "kd": kd, "work": work, "settings": common}


def test_distillation_beats_cross_entropy_alone(comparison: dict[str, Any]) -> None:
    ce = comparison["ce"].metrics["val_loss_student"]
    kd = comparison["kd"].metrics["val_loss_student"]
    teacher = comparison["kd"].metrics["val_loss_teacher"]
    print(f"\nvalidation loss: CE only {ce:.4f}, KD {kd:.4f}, teacher {teacher:.4f}")
    assert teacher < kd < ce


def test_the_resized_view_is_far_better_than_the_raw_table(comparison: dict[str, Any]) -> None:
    """A table with rows that no batch used, as the base package's has: 64 trained of 256."""
    saved = read_checkpoint(comparison["work"] / "kd" / "final.pt")
    weights = dict(saved.weights)
    noise = torch.randn(192, 64, generator=torch.Generator().manual_seed(0))
    weights["pos.weight"] = torch.cat((weights["pos.weight"], noise))
    config = Checkpoint("test", weights).student_config(n_heads=4)
    student = Student(config)
    student.load_state_dict(weights)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    run = resolve(comparison["settings"] | {"eval_ctx_lens": (64, 128)}, {}).config
    evaluator = Evaluator(run, streams_for(run), None, choose_precision(run))
    resized = evaluator.student_loss(student, 128, 64)
    raw = evaluator.student_loss(student, 128, 64, raw=True)
    inside = evaluator.student_loss(student, 64, 64)
    print(f"\nloss at 64: {inside:.4f}; at 128 resized {resized:.4f}, raw table {raw:.4f}")
    assert resized < raw - 0.5
    assert resized < inside + 0.5
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_the_teacher_reads_its_vocabulary_and_context(settings: Settings) -> None:
    spec = read_teacher_spec(settings["teacher_name"])
    assert (spec.max_context, spec.vocab_size) == (64, 520)
    teacher = load_teacher(spec, dtype=torch.float32, device=torch.device("cpu"))
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_snapshots_by_time(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every 30 minutes by the clock; here the clock is always due."""
    monkeypatch.setattr(loop, "TIME_EVERY_SECONDS", 0)
    train(settings, train_steps=2, save_every=100, eval_every=100)
    (timed, *_) = (tmp_path / "work").glob("ckpt_time_*.pt")
    assert read_checkpoint(timed).step in (1, 2)


def test_scalars_go_where_vertex_says(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", str(tmp_path / "board"))
    train(settings, output_gcs_uri=str(tmp_path / "other"), train_steps=3)
    result = train(settings)
    assert len(list((tmp_path / "board").iterdir())) == 2, "each run has a directory of its own"
    assert not (tmp_path / "work" / "tensorboard").exists()
    (own,) = (tmp_path / "board").glob("*-work-*")
    events = EventAccumulator(str(own))
    events.Reload()
    last = events.Scalars("eval/val_loss_student@32")[-1]
    assert last.step == 6
    assert last.value == pytest.approx(result.metrics["val_loss_student"], rel=1e-6)
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


# ── what ends a run saves first


def fail_at(monkeypatch: pytest.MonkeyPatch, place: str, call: int, error: Exception) -> None:
    """Let a method fail at one call of it."""
    owner, name = {
        "gradients": (TrainStep, "micro_step"),
        "update": (TrainStep, "update"),
        "log": (LogWindow, "means"),
        "evaluation": (Evaluator, "metrics"),
        "scalars": (loop.ScalarLog, "flush"),
    }[place]
    real, calls = getattr(owner, name), list[int]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize(
    ("place", "call", "saved", "error"),
    [
        ("gradients", 9, 4, MemoryError()),
        ("log", 5, 5, RuntimeError("a defect")),
        ("evaluation", 2, 6, UsageError("x")),
        ("scalars", 2, 6, KeyError("a defect")),
    ],
)
def test_a_failure_saves_the_last_update_and_the_run_goes_on_bit_for_bit(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    call: int,
    saved: int,
    error: Exception,
) -> None:
    del settings["global_batch"]
    settings |= {"grad_accum": 2, "save_every": 1000, "train_steps": 8}
    settings |= {"dropout": 0.1, "eval_every": 3, "log_interval": 1}
    train(settings, local_workdir=str(tmp_path / "whole"))
    with monkeypatch.context() as patched:
        fail_at(patched, place, call, error)
        with pytest.raises(type(error)) as caught:
            train(settings)
    assert caught.value is error
    (snapshot,) = (tmp_path / "work").glob("ckpt_step_*.pt")
    assert read_checkpoint(snapshot).step == saved
    result = train(settings)
    whole = final(tmp_path / "whole")
    assert_same(whole, final(tmp_path / "work"))
    assert result.best_step == whole.trainer_state["best_step"]
    assert lasting_lines(str(tmp_path / "work")) == lasting_lines(str(tmp_path / "whole"))
    names = {path.name for path in (tmp_path / "whole").glob("ckpt_best*.pt")}
    assert names == {path.name for path in (tmp_path / "work").glob("ckpt_best*.pt")}


def test_a_failure_in_the_middle_of_an_update_saves_nothing(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    fail_at(monkeypatch, "update", 2, RuntimeError("a defect"))
    with pytest.raises(RuntimeError, match="a defect"):
        train(settings)
    assert not list((tmp_path / "work").glob("*.pt"))
    errors = capsys.readouterr().err
    assert "step 1 is not saved: the failure came in the middle of an update" in errors


def test_a_failure_that_leaves_weights_not_finite_saves_nothing(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    fail_at(monkeypatch, "gradients", 3, RuntimeError("a defect"))
    monkeypatch.setattr(TrainStep, "weights_are_finite", lambda _: False)
    with pytest.raises(RuntimeError, match="a defect"):
        train(settings)
    assert not list((tmp_path / "work").glob("*.pt"))
    assert "step 2 is not saved: its weights are not finite" in capsys.readouterr().err


def test_a_failure_of_the_storage_says_that_nothing_is_saved(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    output = tmp_path / "out"
    real = TrainStep.update

    def update(self: TrainStep, learning_rate: float) -> Any:
        if self.optimizer.state and output.is_dir():
            shutil.rmtree(output)
            output.write_text("not a directory any more")
        return real(self, learning_rate)

    monkeypatch.setattr(TrainStep, "update", update)
    with pytest.raises(StorageError):
        train(settings, output_gcs_uri=str(output), train_steps=20, save_every=2)
    assert "is not saved: " in capsys.readouterr().err


# ── what is not the run does not end it


def test_a_scalar_directory_that_is_removed_is_told_once(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    real = Evaluator.metrics

    def metrics(*args: Any) -> Any:
        shutil.rmtree(tmp_path / "work" / "tensorboard", ignore_errors=True)
        return real(*args)

    monkeypatch.setattr(Evaluator, "metrics", metrics)
    assert train(settings).step == 6
    assert capsys.readouterr().err.count("TensorBoard scalars are not recorded any more") == 1


def test_a_scalar_directory_that_cannot_be_made_is_told_once(
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_up_logging()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIP_TENSORBOARD_LOG_DIR", str(tmp_path / "file" / "board"))
    assert train(settings).step == 6
    assert capsys.readouterr().err.count("TensorBoard scalars are not recorded any more") == 1
