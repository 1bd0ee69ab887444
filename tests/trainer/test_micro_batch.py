"""``--micro_batch=auto``: what is chosen, from which measurements, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.config import AUTO, TrainConfig, as_text, parse_value, resolve, settings_from_yaml
from trainer.errors import TrainingError, UsageError
from trainer.micro_batch import MOST_TOKENS, candidates, choose, resolve_micro_batch
from trainer.parallel import Processes
from trainer.precision import choose_precision
from trainer.student import Student, StudentConfig
from trainer.teacher import Teacher, TeacherSpec

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
    from trainer.config import accumulation

    resolved = resolve({"micro_batch": AUTO, **settings}, {})
    with pytest.raises(UsageError, match=words):
        accumulation(resolved, world_size)


def test_a_run_on_the_cpu(settings: dict[str, Any], tmp_path: Path) -> None:
    """It trains what the same run with the number trains, and goes on from its own snapshots."""
    from trainer import entrypoint
    from trainer.checkpoint import read_checkpoint

    weights = {}
    for name, micro_batch, steps in (("auto", "auto", 3), ("auto", "auto", 6), ("number", 6, 6)):
        flags = settings | {
            "global_batch": 12,
            "micro_batch": micro_batch,
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
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 1 <= smaller.micro_batch < largest.micro_batch
    assert smaller.grad_accum == 512 // smaller.micro_batch
