"""The trainer's step at other sizes and micro-batches, on one GPU: rows for `pipelines.estimates`.

    PYTHONPATH=trainer_image python bench/sizes.py

Random weights and tokens, bf16, compiled; 16,384 tokens an update.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent))

from gpu_step import RATE, STUDENT, VOCABULARY, say
from measure import time_runs

from trainer.loss.chunked import Mix
from trainer.models.student import Student
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.training.precision import choose_precision
from trainer.training.step import TrainStep

TOKENS = 16_384
Shape = tuple[int, int]
DEFAULT: Shape = (10, 768)
SMALL: Shape = (6, 512)
ROWS: dict[Shape | None, tuple[tuple[Shape, int, int], ...]] = {
    (24, 1024): ((DEFAULT, 512, 32), (SMALL, 512, 32)),
    (48, 1600): ((DEFAULT, 512, 32), (DEFAULT, 512, 8), (DEFAULT, 1024, 8)),
    None: ((DEFAULT, 512, 32), (DEFAULT, 512, 8), (SMALL, 512, 32), ((16, 1024), 1024, 16)),
    (16, 1024): ((DEFAULT, 512, 32),),
}
"""By the teacher's layers and width (None: alpha 0): the student's, context, windows a pass."""


def teacher_of(shape: Shape) -> Teacher:
    """A GPT-2 of random weights, its body made fast."""
    layers, width = shape
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64))
    torch.set_default_dtype(torch.float32)
    teacher = Teacher(model, TeacherSpec("random", 1024, VOCABULARY))
    teacher.prepare(compiled=True, sharded=False)
    return teacher


def tokens_per_second(
    shape: Shape, teacher: Teacher | None, context: int, windows: int, runs: int
) -> float:
    """Of updates that follow each other, by their median."""
    torch._dynamo.reset()
    accumulation = TOKENS // (context * windows)
    config = TrainConfig(
        teacher_name="random",
        dataset_name="random",
        block_size=context,
        micro_batch=windows,
        grad_accum=accumulation,
        bf16=True,
        compile="on",
    )
    device = torch.device("cuda")
    layers, width = shape
    network = replace(STUDENT, n_layers=layers, d_model=width, n_heads=width // 64)
    student = Student(network).initialize(0)
    precision = choose_precision(config, device)
    step = TrainStep(config, student, teacher, precision, Processes(device=device), {}, None)
    ids = torch.randint(VOCABULARY, (windows, context)).pin_memory()
    mix = Mix(0.5 if teacher else 0.0, 2.0)

    def update() -> None:
        for index in range(accumulation):
            last = index == accumulation - 1
            step.micro_step(ids, ids, mix, records=None, accumulation=accumulation, last=last)
        step.update(RATE)
        for _ in step.outcomes(wait=False):
            pass

    return TOKENS / time_runs(update, runs=runs).median * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=40, help="timed updates of each row")
    runs = parser.parse_args().runs
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for shape, group in ROWS.items():
        teacher = None if shape is None else teacher_of(shape)
        for student, context, windows in group:
            rate = tokens_per_second(student, teacher, context, windows, runs)
            say(f"student {student}, teacher {shape}, {windows} x {context}: {rate:,.0f} tokens/s")


if __name__ == "__main__":
    main()
