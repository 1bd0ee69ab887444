"""The training step on one GPU and on all GPUs of the host: DDP, FSDP2, a sharded teacher.

    PYTHONPATH=trainer_image torchrun --nproc-per-node=gpu bench/scaling.py --json scaling.json

First every GPU makes the step alone, then all together; each has the same micro-batch, so the
tokens of an update grow with the GPUs. Weights are random, of gpt2-xl's and the default student's
size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).parent))

from measure import fresh_memory

from trainer.loss.chunked import Mix
from trainer.models.student import Student, StudentConfig
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.runtime.processes import Processes, joined_processes
from trainer.settings.config import TrainConfig
from trainer.training.precision import choose_precision
from trainer.training.step import TrainStep

VARIANTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "fsdp, teacher sharded": {"parallel": "fsdp", "shard_teacher": True},
}


def build_teacher(options: argparse.Namespace, device: torch.device, *, sharded: bool) -> Teacher:
    """A GPT-2 of random weights, the same on every process."""
    layers, width, heads = options.teacher
    config = GPT2Config(vocab_size=options.vocabulary, n_embd=width, n_layer=layers, n_head=heads)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = GPT2LMHeadModel(config)
    torch.set_default_dtype(torch.float32)
    teacher = Teacher(model, TeacherSpec("gpt2", 1024, options.vocabulary))
    teacher.prepare(compiled=True, sharded=sharded)
    return teacher


def time_variant(
    settings: dict[str, Any], teacher: Teacher, processes: Processes, options: argparse.Namespace
) -> dict[str, float]:
    """Mean milliseconds of an update, and peak memory: of the slowest and the fullest process."""
    config = TrainConfig(
        teacher_name="gpt2", dataset_name="random", block_size=options.context, **settings
    )
    layers, width, heads = options.student
    shape = StudentConfig(options.vocabulary, width, layers, heads, positions=1024)
    precision = choose_precision(config, processes.device)
    step = TrainStep(config, Student(shape).initialize(0), teacher, precision, processes, {})
    ids, labels = draw_batch(options, processes)
    gpu, began = processes.device.type == "cuda", 0.0
    for number in range(options.warmup + options.steps):
        if number == options.warmup:
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            dist.barrier()
            began = time.perf_counter()
        step.micro_step(ids, labels, Mix(0.5, 2.0), accumulation=1, last=True)
        step.update(1e-4)
        list(step.outcomes(wait=False))
    if gpu:
        torch.cuda.synchronize()
    took = (time.perf_counter() - began) / options.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    return {"ms": 1e3 * largest(took), "peak GiB": largest(peak)}


def draw_batch(options: argparse.Namespace, processes: Processes) -> tuple[Tensor, Tensor]:
    """Inputs and labels, other ones on every process."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    shape = (options.micro_batch, options.context + 1)
    stream = torch.randint(0, options.vocabulary, shape, generator=generator)
    ids, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
    # From where the training loop has them
    if processes.device.type == "cuda":
        return ids.pin_memory(), labels.pin_memory()
    return ids, labels


def largest(value: float) -> float:
    """The largest of the processes' numbers."""
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return float(box)


def parse() -> argparse.Namespace:
    def triple(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--teacher", type=triple, default=[48, 1600, 25], help="layers,width,heads")
    parser.add_argument("--student", type=triple, default=[10, 768, 12], help="layers,width,heads")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=32, help="windows of each GPU")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args()


def main() -> None:
    options = parse()
    report: dict[str, Any] = {}
    with joined_processes() as processes:
        if processes.world_size == 1:
            sys.exit("start this with torchrun and two processes or more")
        teacher: Teacher | None = None
        for name in options.variants:
            settings = VARIANTS[name]
            if teacher is None or settings.get("shard_teacher"):
                teacher = None
                with fresh_memory():
                    sharded = bool(settings.get("shard_teacher"))
                    teacher = build_teacher(options, processes.device, sharded=sharded)
            group = Processes(device=processes.device) if name == "alone" else processes
            with fresh_memory():
                found: dict[str, Any] = time_variant(settings, teacher, group, options)
            tokens = options.micro_batch * options.context * group.world_size
            found["tokens/s"] = tokens / found["ms"] * 1e3
            if "alone" in report:
                found["to one GPU"] = found["tokens/s"] / report["alone"]["tokens/s"]
            report[name] = found
            if processes.main:
                shown = ", ".join(f"{key} {value:,.2f}" for key, value in found.items())
                print(f"{name}: {shown}", flush=True)
                if options.json:
                    options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
