"""What each way to stretch a position table costs at once, and after some training.

    PYTHONPATH=trainer_image python bench/resize.py --tokens TOKENS --teacher TEACHER \
        --checkpoint RUN/final.pt --updates 100 500

From one checkpoint, students with tables twice as long take the same batches side by side, as the
pipeline's continuation does: a new optimizer, warmup and cosine, alpha 0.5, T 1. Beside the methods
that the trainer has, others are tried here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoints.reading import read_checkpoint
from trainer.data.batches import BatchSampler
from trainer.data.streams import open_streams
from trainer.loss.chunked import DistillLoss, Mix
from trainer.models.positions import RESIZE_METHODS, resize_positions
from trainer.models.student import Student
from trainer.models.teacher import load_teacher, read_teacher_spec
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.settings.schedules import learning_rate
from trainer.training.evaluation import Evaluator
from trainer.training.precision import choose_precision
from trainer.training.step import TrainStep

STARTED = time.perf_counter()


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


# ── methods that are tried: trained rows ``[n, D]`` and a length to ``[length, D]``


def blended_copy(rows: Tensor, length: int) -> Tensor:
    """Copies; behind each seam an eighth of them comes in slowly from the last row."""
    table = RESIZE_METHODS["copy"](rows, length)
    size = len(rows)
    width = max(1, size // 8)
    share = torch.arange(1, width + 1, device=rows.device)[:, None] / (width + 1)
    for seam in range(size, length, size):
        end = min(seam + width, length)
        part = share[: end - seam].to(rows.dtype)
        table[seam:end] = (1 - part) * rows[-1] + part * table[seam:end]
    return table


def upper_half_copied(rows: Tensor, length: int) -> Tensor:
    """The rows, then their upper half again and again: never the first rows, which are special."""
    half = len(rows) // 2
    more = torch.arange(length - len(rows), device=rows.device) % (len(rows) - half)
    return torch.cat((rows, rows[half + more]))


def mirrored(rows: Tensor, length: int) -> Tensor:
    """Forward and backward in turn, so that neighbours stay neighbours."""
    size = len(rows)
    place = torch.arange(length, device=rows.device) % (2 * size)
    return rows[torch.where(place < size, place, 2 * size - 1 - place)]


def upper_half_stretched(rows: Tensor, length: int) -> Tensor:
    """The lower half as it is, the upper one interpolated over all that is left."""
    half = len(rows) // 2
    return torch.cat((rows[:half], RESIZE_METHODS["linear"](rows[half:], length - half)))


TRIED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "copy, blended at the seam": blended_copy,
    "upper half copied": upper_half_copied,
    "mirrored": mirrored,
    "upper half stretched": upper_half_stretched,
}


def main() -> None:
    options = parse()
    streams = open_streams(options.tokens)
    saved = read_checkpoint(options.checkpoint)
    small = saved.student_config()
    trained = saved.trained_positions(required=True)
    assert trained is not None, "a table whose trained rows are unknown is refused"
    context = options.stretch * trained
    config = TrainConfig(
        teacher_name=str(options.teacher),
        dataset_name="tokens",
        block_size=context,
        micro_batch=options.batch_tokens // context,
        global_batch=options.batch_tokens // context,
        grad_accum=1,
        lr=options.rate,
        alpha=0.5,
        eval_max_tokens=options.eval_tokens,
        train_steps=max(options.updates),
    )
    precision = choose_precision(config)
    spec = read_teacher_spec(str(options.teacher))
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device)
    teacher.prepare(compiled=precision.compiles(config), sharded=False)
    evaluator = Evaluator(config, streams, None, precision)
    report: dict[str, Any] = {"teacher": spec.name, "trained": trained, "context": context}
    student = Student(small)
    student.load_state_dict(saved.weights)
    student.to(precision.device)
    report["before the stretch"] = evaluator.student_loss(student, trained, trained)
    say(f"at {trained} before the stretch: {report['before the stretch']:.4f}")
    steps: dict[str, TrainStep] = {}
    for method, make in (RESIZE_METHODS | TRIED).items():
        weights = dict(saved.weights)
        if make in RESIZE_METHODS.values():
            table = resize_positions(weights["pos.weight"], trained, context, method)
        else:
            table = make(weights["pos.weight"][:trained], context)
        weights["pos.weight"] = table
        longer = Student(replace(small, positions=context))
        longer.load_state_dict(weights)
        steps[method] = TrainStep(
            config, longer, teacher, precision, Processes(device=precision.device), {}
        )
    report["losses"] = {0: losses(evaluator, steps, trained, context)}
    sampler = BatchSampler(
        streams.train,
        block_size=context,
        global_batch=config.micro_batch,
        micro_batch=config.micro_batch,
        seed=options.seed,
    )
    for number in range(max(options.updates)):
        learn(number, steps, sampler, options, teacher)
        if number + 1 in options.updates:
            report["losses"][number + 1] = losses(evaluator, steps, trained, context)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))
    print(table_of(report["losses"], trained, context))


def learn(
    number: int,
    steps: dict[str, TrainStep],
    sampler: BatchSampler,
    options: argparse.Namespace,
    teacher: Any,
) -> None:
    """One update of all, from one pass of the teacher."""
    ids, labels = (part.to(teacher.device) for part in sampler.batch(number, 0))
    with torch.no_grad():
        hidden = teacher.hidden(ids)
    rate = learning_rate(
        number,
        peak=options.rate,
        warmup_steps=options.warmup,
        train_steps=max(options.updates),
    )
    for step in steps.values():
        output = DistillLoss(*step.module(ids, labels, hidden, None, Mix(0.5, 1.0)))
        output.loss.backward()
        step.update(rate)
        for _ in step.outcomes(wait=False):
            pass


def losses(
    evaluator: Evaluator, steps: dict[str, TrainStep], trained: int, context: int
) -> dict[str, dict[int, float]]:
    """By method, at the context trained at before and at the longer one."""
    found = {
        method: {
            length: evaluator.student_loss(step.student, length, context)
            for length in (trained, context)
        }
        for method, step in steps.items()
    }
    for method, by_context in found.items():
        say(f"  {method}: " + ", ".join(f"{loss:.4f} at {at}" for at, loss in by_context.items()))
    return found


def table_of(found: dict[int, dict[str, dict[int, float]]], trained: int, context: int) -> str:
    heads = [f"{trained} after {n}, {context} after {n}" for n in found]
    lines = ["| method | " + " | ".join(", ".join(heads).split(", ")) + " |"]
    lines.append("| --- |" + " --- |" * 2 * len(found))
    for method in found[0]:
        cells = [f"{found[n][method][at]:.4f}" for n in found for at in (trained, context)]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, required=True, help="of trainer.prepare_tokens")
    parser.add_argument("--teacher", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--checkpoint", type=Path, required=True, help="of a student")
    parser.add_argument("--stretch", type=int, default=2, help="times the trained positions")
    parser.add_argument("--batch_tokens", type=int, default=16_384, help="of an update")
    parser.add_argument("--updates", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rate", type=float, default=2.7e-4, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--eval_tokens", type=int, default=524_288)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
