"""``--micro_batch=auto``: what is chosen, from which measurements, and what it refuses."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trainer import entrypoint
from trainer.checkpoints.metadata import settings_from_meta
from trainer.checkpoints.reading import read_checkpoint
from trainer.loss.chunked import Mix
from trainer.models.student import Student, StudentConfig
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.runtime.errors import TrainingError, UsageError
from trainer.runtime.processes import Processes
from trainer.settings.accumulation import accumulation
from trainer.settings.config import AUTO, TrainConfig
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import resolve, settings_from_yaml
from trainer.settings.values import as_text, given, parse_value
from trainer.training import micro_batch, run
from trainer.training.micro_batch import (
    MEMORY_SHARE,
    MOST_TOKENS,
    candidates,
    choose,
    resolve_micro_batch,
)
from trainer.training.precision import Precision, choose_precision
from trainer.training.step import TrainStep

GIB = 1 << 30


def test_candidates_divide_and_are_capped() -> None:
    assert candidates(12, 512) == [1, 2, 3, 4, 6, 12]
    assert candidates(7, 512) == [1, 7]
    assert max(candidates(4096, 1024)) * 1024 == MOST_TOKENS
    assert candidates(4, 2 * MOST_TOKENS) == [1]


class Memory:
    """A GPU's memory as a function of the size, and what was asked of it."""

    def __init__(self, needed: Callable[[int], float], total: float) -> None:
        self.needed, self.total = needed, total
        self.asked: list[int] = []

    def peak(self, size: int) -> int | None:
        self.asked.append(size)
        needed = self.needed(size)
        return None if needed > self.total else int(needed * GIB)


@pytest.mark.parametrize(
    ("needed", "limit", "expected"),
    [
        (lambda size: 5 + 0.3 * size, 70, 128),
        (lambda size: 5 + 0.3 * size, 26, 64),
        (lambda size: 5 + 0.3 * size, 24.1, 32),
        (lambda size: 5 + 0.3 * size, 7.5, 8),
        # Under the first size of the line, one window at a time
        (lambda size: 5 + 1.0 * size, 7, 2),
        (lambda size: 5 + 1.0 * size, 6, 1),
        # Steeper than the line says
        (lambda size: 5 + 0.3 * size + (20 if size >= 64 else 0), 30, 32),
        (lambda size: 5 + 0.01 * size**2, 40, 32),
    ],
)
def test_largest_that_fits(needed: Callable[[int], float], limit: float, expected: int) -> None:
    memory = Memory(needed, total=limit * 1.05)
    size, peak = choose(candidates(128, 512), memory.peak, int(limit * GIB), 512)
    assert size == expected
    assert peak == int(needed(size) * GIB)
    assert size in memory.asked, "what is returned has been measured"
    assert len(memory.asked) == len(set(memory.asked)), "no size is compiled twice"


def test_few_sizes_are_tried() -> None:
    memory = Memory(lambda size: 5 + 0.3 * size, total=80)
    choose(candidates(128, 512), memory.peak, 70 * GIB, 512)
    assert memory.asked == [8, 16, 128]


def test_not_even_one() -> None:
    with pytest.raises(TrainingError, match=r"not even one window of 512 tokens fits in 4\.0 GiB"):
        choose([1, 2, 4], Memory(lambda size: 5.0, 80).peak, 4 * GIB, 512)


def test_text_and_number_round_trip(tmp_path: Path) -> None:
    assert parse_value("micro_batch", "auto") == AUTO
    assert as_text("micro_batch", AUTO) == "auto"
    assert as_text("micro_batch", 4) == "4"
    assert as_text("eval_ctx_lens", (512, 1024)) == "512,1024"
    for wrong in ("0", "-3"):
        with pytest.raises(UsageError, match=f"--micro_batch={wrong} must be at least 1, or auto"):
            parse_value("micro_batch", wrong)
    with pytest.raises(UsageError, match="--micro_batch='many': a whole number is needed"):
        parse_value("micro_batch", "many")
    path = tmp_path / "run.yaml"
    path.write_text("micro_batch: auto\n")
    resolved = resolve({}, settings_from_yaml(str(path)))
    assert resolved.config.micro_batch == AUTO
    assert "micro_batch = auto (--config)" in list(resolved.lines())


@pytest.mark.parametrize(
    ("settings", "world_size", "words"),
    [
        ({"grad_accum": 4}, 1, "leave out --grad_accum=4"),
        ({"global_batch": 9}, 2, "--global_batch=9 is not divisible by 2 processes"),
        ({"parallel": "fsdp"}, 2, "not with --parallel=fsdp or --shard_teacher; give a number"),
        ({"shard_teacher": True}, 2, "give a number"),
    ],
    ids=str,
)
def test_what_auto_excludes(settings: dict[str, Any], world_size: int, words: str) -> None:
    resolved = resolve({"micro_batch": AUTO, **settings}, {})
    with pytest.raises(UsageError, match=words):
        accumulation(resolved, world_size)


def test_a_checkpoint_that_tells_only_grad_accum() -> None:
    """Its windows per update are unknown; the user, who gave no such flag, is asked for them."""
    meta = settings_from_meta({"grad_accum": 4})
    with pytest.raises(UsageError, match="the checkpoint tells only grad_accum 4; give --global_b"):
        accumulation(resolve({"micro_batch": AUTO}, {}, meta), 1)
    asked = {"micro_batch": AUTO, "global_batch": 32}
    assert accumulation(resolve(asked, {}, meta), 1) == AUTO
    whole = settings_from_meta({"grad_accum": 4, "global_batch": 16})
    resolved = resolve({"micro_batch": AUTO}, {}, whole)
    assert (accumulation(resolved, 1), resolved.config.global_batch) == (AUTO, 16)


def test_it_reaches_every_process_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the flags of torchrun, and over a pipeline's number by its further settings."""
    started: list[list[str]] = []
    monkeypatch.setattr(run, "launch_if_needed", lambda _, flags: started.append(flags))
    monkeypatch.setattr(run, "run", lambda settings: settings)
    settings = given(**({"micro_batch": 8, "global_batch": 32} | {"micro_batch": "auto"}))
    entrypoint.run_on_all_gpus(settings)
    parser = build_parser("prog", "")
    assert settings_from_args(parser.parse_args(started[0])) == settings
    assert settings["micro_batch"] == AUTO
    assert "--micro_batch N|auto" in parser.format_help()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--micro_batch=auto", "--grad_accum=2"], "leave out --grad_accum=2"),
        (["--micro_batch=0"], "--micro_batch=0 must be at least 1, or auto"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_ends_with_one_line_and_status_2(
    settings: dict[str, Any], flags: list[str], words: str
) -> None:
    kept = [f"--{k}={v}" for k, v in settings.items() if k not in ("micro_batch", "global_batch")]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.entrypoint", *kept, *flags],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert words in line


def test_a_run_on_the_cpu(settings: dict[str, Any], tmp_path: Path) -> None:
    """It trains what the same run with the number trains, and goes on from its own snapshots."""
    weights = {}
    for name, windows, steps in (("auto", "auto", 3), ("auto", "auto", 6), ("number", 6, 6)):
        flags = settings | {
            "global_batch": 12,
            "micro_batch": windows,
            "train_steps": 6,
            "local_workdir": str(tmp_path / name),
        }
        argv = [f"--{key}={value}" for key, value in flags.items()]
        entrypoint.main(argv)
        if steps == 3:
            for later in ("final.pt", "best.pt", "ckpt_step_6.pt"):
                for file in (tmp_path / name).glob(f"{later}*"):
                    file.unlink()
        checkpoint = tmp_path / name / ("ckpt_step_3.pt" if steps == 3 else "final.pt")
        weights[name] = read_checkpoint(checkpoint)
    assert weights["auto"].meta["micro_batch"] == 6, "the largest divisor of 12 up to 8"
    assert weights["auto"].meta["grad_accum"] == 2
    for key, value in weights["number"].weights.items():
        assert torch.equal(value, weights["auto"].weights[key])


def test_a_new_phase_takes_its_windows_per_update_from_the_checkpoint(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    del settings["micro_batch"], settings["global_batch"]
    numbers = {"micro_batch": 2, "grad_accum": 5, "local_workdir": str(first)}
    entrypoint.run(settings | numbers | {"train_steps": 3})
    path = tmp_path / "run.yaml"
    path.write_text("micro_batch: auto\n")
    source = {"resume_gcs_uri": str(first / "final.pt"), "local_workdir": str(second)}
    entrypoint.run(settings | source, settings_from_yaml(str(path)))
    meta = read_checkpoint(second / "final.pt").meta
    assert (meta["global_batch"], meta["micro_batch"], meta["grad_accum"]) == (10, 5, 2)
    # Started again with a number, it is still the same run
    again = settings | source | {"micro_batch": 2}
    assert entrypoint.run(again).step == 6  # type: ignore[union-attr]


# ── the search on a GPU, its memory simulated


class FakeTrial:
    """Stands in for the passes on a GPU; every window needs one of 50 GiB."""

    def __init__(self, *_: Any) -> None:
        pass

    def memory_limit(self) -> int:
        return int(MEMORY_SHARE * 50 * GIB)

    def peak(self, size: int) -> int | None:
        return size * GIB if size <= 50 else None


class Fellow(Processes):
    """One of two processes; the other has found room for 8 windows."""

    def min(self, value: int) -> int:
        return min(value, 8)


@pytest.mark.parametrize(
    ("processes", "chosen", "accumulated", "words"),
    [
        (
            Processes(),
            32,
            2,
            "32 windows (4096 tokens) per pass, 2 passes per update; 32.0 of 50.0",
        ),
        (
            Fellow(world_size=2),
            8,
            4,
            "8 windows (1024 tokens) per pass, 4 passes per update; anoth",
        ),
    ],
    ids=["alone", "two"],
)
def test_what_is_found_flows_on_and_is_logged(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    processes: Processes,
    chosen: int,
    accumulated: int,
    words: str,
) -> None:
    monkeypatch.setattr(micro_batch, "_Trial", FakeTrial)
    resets: list[bool] = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(True))
    monkeypatch.setattr(micro_batch.log, "propagate", True)
    config = TrainConfig(block_size=128, micro_batch=AUTO, global_batch=64)
    precision = Precision(torch.device("cuda"), torch.bfloat16, torch.bfloat16)
    with caplog.at_level(logging.INFO):
        found = resolve_micro_batch(config, None, None, precision, processes)  # type: ignore[arg-type]
    assert found == replace(config, micro_batch=chosen, grad_accum=accumulated)
    assert caplog.messages[-1].startswith("micro_batch auto: " + words)
    assert len(resets) == processes.world_size - 1, "DDP compiles in parts of its own"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Makes a trial on the CPU, whose GPU's counters always say 1 GiB."""
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: GIB)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 10 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 1.0)

    def make(processes: Processes | None = None) -> Any:
        student = Student(
            StudentConfig(50, d_model=16, n_layers=2, n_heads=2, positions=8, dropout=0.5)
        ).initialize(0)
        config = TrainConfig(block_size=8, micro_batch=AUTO, dropout=0.5, alpha=0.0)
        precision = Precision(torch.device("cpu"), torch.float32, torch.float32)
        return micro_batch._Trial(config, student, None, precision, processes or Processes())

    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield make


def test_a_trial_leaves_nothing_behind(tiny: Callable[..., Any]) -> None:
    trial = tiny()
    student, limit = trial.step.student, torch._dynamo.config.recompile_limit
    before, numbers = copy.deepcopy(student.state_dict()), torch.get_rng_state()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    assert trial.peak(2) == GIB + 8 * parameters, "with AdamW's two moments"
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not trial.step.optimizer.state
    assert torch.equal(torch.get_rng_state(), numbers), "dropout drew from a copy"
    for name, value in student.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch._dynamo.config.recompile_limit == limit + 1
    shared = tiny(Processes(world_size=2))
    assert shared.peak(2) == GIB + 12 * parameters, "and with DDP's buckets"


def test_the_limit_is_of_what_is_free_to_this_process(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tiny().memory_limit() == int(MEMORY_SHARE * 70 * GIB)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.25)
    assert tiny().memory_limit() == int(MEMORY_SHARE * 20 * GIB)


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_memory_that_runs_out_in_a_trial(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """In the middle of a pass, with gradients already there."""
    trial = tiny()
    whole = trial.step.micro_step

    def short(ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output = whole(ids, *args, **kwargs)
        if ids.shape[0] > 2:
            raise error
        return output

    monkeypatch.setattr(trial.step, "micro_step", short)
    assert trial.peak(4) is None
    assert all(parameter.grad is None for parameter in trial.step.student.parameters())
    size, _ = choose([1, 2, 4, 8], trial.peak, 2 * GIB, context=8)
    assert size == 2


def test_another_failure_of_a_trial_is_not_taken_for_it(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = tiny()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(trial.step, "micro_step", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        trial.peak(2)


def test_the_smallest_number_of_several_processes(tmp_path: Path) -> None:
    script = tmp_path / "smallest.py"
    script.write_text(
        "from trainer.runtime.processes import joined_processes\n"
        "with joined_processes() as processes:\n"
        "    assert processes.min(7 - processes.rank) == 6\n"
    )
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", str(script)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU is what is asked for")
def test_on_the_gpu() -> None:
    config = TrainConfig(
        teacher_name="t",
        dataset_name="d",
        block_size=256,
        micro_batch=AUTO,
        global_batch=512,
        compile="off",
        alpha=0.5,
    )
    device = torch.device("cuda")
    student = Student(StudentConfig(5000, d_model=256, n_layers=4, n_heads=4, positions=256))
    student.initialize(0)
    before = copy.deepcopy(student.state_dict())
    with torch.device(device):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=5000, n_embd=256, n_layer=4, n_head=4))
    teacher = Teacher(model.to(torch.bfloat16), TeacherSpec("t", 1024, 5000))
    teacher.prepare(compiled=True, sharded=False)
    precision, alone = choose_precision(config, device), Processes(device=device)
    largest = resolve_micro_batch(config, student, teacher, precision, alone)
    assert largest.micro_batch * 256 == MOST_TOKENS, "all of it fits"
    assert largest.grad_accum == 2
    for name, value in student.state_dict().items():
        assert torch.equal(value.cpu(), before[name])
    # Leave little more than what is in use, so that memory really runs out in a trial
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.5 * GIB / total)
    try:
        smaller = resolve_micro_batch(config, student, teacher, precision, alone)
        assert 1 <= smaller.micro_batch < largest.micro_batch
        assert smaller.grad_accum == 512 // smaller.micro_batch
        for name, value in student.state_dict().items():
            assert torch.equal(value.cpu(), before[name])
        trial = micro_batch._Trial(config, student, teacher, precision, alone)
        assert trial.peak(largest.micro_batch) is None, "what fitted before runs out of memory"
        del trial
        # What was chosen runs, with the moments that the search only counted
        step = TrainStep(smaller, student, teacher, precision, alone, {})
        ids = torch.zeros((smaller.micro_batch, 256), dtype=torch.int64, device=device)
        for _ in range(2):
            for last in (False, True):
                mix = Mix(0.5, 1.0, "forward_kl")
                step.micro_step(ids, ids, mix, accumulation=2, last=last)
            step.update(1e-4)
        torch.cuda.synchronize()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
