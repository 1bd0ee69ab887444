"""What a student learns from each form of the teacher's targets, after the same tokens.

    python -m trainer.prepare_tokens TOKENS --teacher_name=TOKENIZER --dataset_name=TEXT
    python -m trainer.entrypoint --tokens_dir=TOKENS --alpha=0 --d_model=1024 --n_layers=16 \
        --n_heads=16 --block_size=512 --train_steps=1200 --output_gcs_uri=RUN …
    python -m trainer.export_hf RUN/final.pt TEACHER
    PYTHONPATH=trainer_image python bench/quality.py --tokens TOKENS --teacher TEACHER --seeds 1 2

For each seed and schedule, students of the same initial weights take the same batches side by side,
each with its own form of targets from the same pass of the teacher. Step, loss, optimizer and
evaluation are the trainer's; this project's form goes through its records as they would be stored.
The other forms are given exact weights, whatever their bytes could hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.data.batches import BatchSampler
from trainer.data.streams import TokenStreams, open_streams
from trainer.loss.chunked import DistillLoss, Mix
from trainer.loss.sparse import SparseTargets
from trainer.models.student import Student, StudentConfig
from trainer.models.teacher import Teacher, load_teacher, read_teacher_spec
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.settings.schedules import learning_rate
from trainer.targets.records import Layout
from trainer.targets.sampling import draw
from trainer.training.evaluation import Evaluator
from trainer.training.precision import choose_precision
from trainer.training.step import TrainStep

STARTED = time.perf_counter()
CHUNK = 4096
SCHEDULES = {
    "alpha 1, T 1": {"alpha": 1.0, "T": 1.0},
    "default": {
        "alpha_schedule": "0:0.7,400:0.5,800:0.3",
        "temp_schedule": "0:1.2,800:1.0",
    },
    "alpha 0.7, T 2": {"alpha": 0.7, "T": 2.0},
}
CE, ONLINE, LONGER = "CE alone", "online", "ours, 64 bytes, teacher at twice the context"


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


# ── forms of targets


class Seen(NamedTuple):
    """Some tokens' distributions, and what a form may draw by."""

    logits: Tensor
    """``[n, V]`` in fp32."""
    labels: Tensor
    uniform: Tensor
    """``[2, n]``."""
    temperature: float
    temperatures: tuple[float, ...]
    """All of the schedule."""


def negentropy(log_p: Tensor) -> Tensor:
    return (log_p.exp() * log_p).sum(-1)


def ours(size: int) -> Callable[[Seen], SparseTargets]:
    def form(seen: Seen) -> SparseTargets:
        layout = Layout(seen.logits.shape[1], seen.temperatures, size)
        drawn = draw(seen.logits, seen.labels, layout, seen.uniform[0])
        return layout.decode(layout.encode(drawn, seen.uniform[1]), seen.temperature)

    return form


def at_random(count: int) -> Callable[[Seen], SparseTargets]:
    """Draws with replacement from the distribution at 1, reweighted at T (Anshumann et al.)."""

    def form(seen: Seen) -> SparseTargets:
        log_p = torch.log_softmax(seen.logits, -1)
        at_t = torch.log_softmax(seen.logits / seen.temperature, -1)
        ids = torch.multinomial(log_p.exp(), count, replacement=True)
        return merged(ids, torch.exp(at_t.gather(1, ids) - log_p.gather(1, ids)) / count, at_t)

    return form


def systematic(count: int) -> Callable[[Seen], SparseTargets]:
    """Every draw from another part of the running sum, nothing kept."""

    def form(seen: Seen) -> SparseTargets:
        log_p = torch.log_softmax(seen.logits, -1)
        at_t = torch.log_softmax(seen.logits / seen.temperature, -1)
        running = log_p.exp().cumsum(-1)
        ticks = torch.arange(count, device=running.device) + 1.0 - seen.uniform[0][:, None]
        ids = torch.searchsorted(running / running[:, -1:], ticks / count)
        ids = ids.clamp(max=running.shape[1] - 1)
        return merged(ids, torch.exp(at_t.gather(1, ids) - log_p.gather(1, ids)) / count, at_t)

    return form


def largest(count: int, *, renormalized: bool) -> Callable[[Seen], SparseTargets]:
    def form(seen: Seen) -> SparseTargets:
        at_t = torch.log_softmax(seen.logits / seen.temperature, -1)
        weights, ids = at_t.exp().topk(count)
        if renormalized:
            weights = weights / weights.sum(1, keepdim=True)
        return SparseTargets(ids, weights, negentropy(at_t))

    return form


def merged(ids: Tensor, weights: Tensor, at_t: Tensor) -> SparseTargets:
    """Draws of the same id as one."""
    ordered, order = ids.sort(1)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = first.cumsum(1) - 1
    total = torch.zeros_like(weights).scatter_add_(1, place, weights.gather(1, order))
    return SparseTargets(torch.zeros_like(ids).scatter_(1, place, ordered), total, negentropy(at_t))


FORMS: dict[str, Callable[[Seen], SparseTargets]] = {
    "ours, 32 bytes": ours(32),
    "ours, 64 bytes": ours(64),
    "ours, 128 bytes": ours(128),
    "16 at random, 64 bytes": at_random(16),
    "16 systematic, 64 bytes": systematic(16),
    "top 16, 64 bytes, rest dropped": largest(16, renormalized=False),
    "top 16, 64 bytes, renormalized": largest(16, renormalized=True),
    "top 100, 300 bytes, renormalized": largest(100, renormalized=True),
}


def logits_of(teacher: Teacher, hidden: Tensor) -> Tensor:
    """``[n, V]`` in fp32, from operands in fp16 as in the trainer."""
    kind = torch.float16 if hidden.is_cuda else torch.float32
    logits = (hidden.to(kind) @ teacher.head.to(kind).T).float()
    return logits if teacher.bias is None else logits + teacher.bias


# ── students


class Pupils:
    """Students that learn from the same batches, each from its own form of targets."""

    def __init__(
        self,
        forms: list[str],
        seed: int,
        schedule: dict[str, Any],
        teacher: Teacher,
        streams: TokenStreams,
        options: argparse.Namespace,
    ) -> None:
        layers, width, heads = options.student
        self.seed, self.options, self.teacher, self.streams = seed, options, teacher, streams
        self.config = TrainConfig(
            teacher_name=str(options.teacher),
            dataset_name="tokens",
            block_size=options.context,
            micro_batch=options.windows,
            global_batch=options.windows,
            grad_accum=1,
            lr=options.rate,
            eval_max_tokens=options.eval_tokens,
            train_steps=options.steps,
            **schedule,
        )
        self.precision = choose_precision(self.config)
        processes = Processes(device=self.precision.device)
        vocabulary = streams.info.vocab_size
        shape = StudentConfig(vocabulary, width, layers, heads, options.context)
        self.steps = {}
        for form in forms:
            student = Student(shape).initialize(seed)
            own = teacher if form == ONLINE else None
            self.steps[form] = TrainStep(self.config, student, own, self.precision, processes, {})
        temperatures = {*self.config.schedule_T.values()}
        self.temperatures = tuple(sorted(temperatures))
        self.generator = torch.Generator().manual_seed(seed)

    def learn(self) -> dict[str, float]:
        """Train all; the validation loss of each."""
        options, config = self.options, self.config
        sampler = BatchSampler(
            self.streams.train,
            block_size=options.context,
            global_batch=options.windows,
            micro_batch=options.windows,
            seed=self.seed,
        )
        for number in range(options.steps):
            ids, labels = (part.to(self.precision.device) for part in sampler.batch(number, 0))
            alpha, temperature = config.schedule_alpha.at(number), config.schedule_T.at(number)
            targets = self.targets(ids, labels.flatten(), temperature)
            if LONGER in self.steps:
                windows = sampler.window_indices(number, 0)
                targets[LONGER] = self.longer(windows, labels.flatten(), temperature)
            rate = learning_rate(
                number, peak=options.rate, warmup_steps=options.warmup, train_steps=options.steps
            )
            for form, step in self.steps.items():
                mix = Mix(0.0 if form == CE else alpha, temperature)
                hidden = self.hidden if form == ONLINE else None
                output = DistillLoss(*step.module(ids, labels, hidden, targets.get(form), mix))
                output.loss.backward()
                step.update(rate)
                for _ in step.outcomes(wait=False):
                    pass
            if number % 200 == 20:
                say(f"    step {number}")
        evaluator = Evaluator(config, self.streams, None, self.precision)
        return {
            form: evaluator.student_loss(step.student, options.context, options.context)
            for form, step in self.steps.items()
        }

    @torch.no_grad()
    def targets(self, ids: Tensor, labels: Tensor, temperature: float) -> dict[str, Any]:
        """Of one pass of the teacher, by form."""
        self.hidden = self.teacher.hidden(ids)
        return self._forms(
            self.hidden.flatten(0, 1), labels, temperature, [f for f in self.steps if f in FORMS]
        )

    @torch.no_grad()
    def longer(self, windows: Any, labels: Tensor, temperature: float) -> SparseTargets:
        """Our form from a teacher whose windows are twice as long, and hold these."""
        context = self.options.context
        starts = [int(window) // 2 * 2 * context for window in windows]
        rows = [
            torch.from_numpy(self.streams.train[s : s + 2 * context].astype("int64"))
            for s in starts
        ]
        rows = [torch.nn.functional.pad(row, (0, 2 * context - len(row))) for row in rows]
        hidden = self.teacher.hidden(torch.stack(rows).to(labels.device))
        halves = [
            row[int(window) % 2 * context :][:context]
            for row, window in zip(hidden, windows, strict=True)
        ]
        form = "ours, 64 bytes"
        return self._forms(torch.cat(halves), labels, temperature, [form])[form]

    def _forms(
        self, hidden: Tensor, labels: Tensor, temperature: float, forms: list[str]
    ) -> dict[str, Any]:
        uniform = torch.rand(2, len(labels), generator=self.generator).to(labels.device)
        found: dict[str, list[SparseTargets]] = {form: [] for form in forms}
        for start in range(0, len(labels) if forms else 0, CHUNK):
            part = slice(start, start + CHUNK)
            logits = logits_of(self.teacher, hidden[part])
            seen = Seen(logits, labels[part], uniform[:, part], temperature, self.temperatures)
            for form in forms:
                found[form].append(FORMS[form](seen))
        return {
            form: SparseTargets(*(torch.cat(field) for field in zip(*parts, strict=True)))
            for form, parts in found.items()
        }


# ── the variance of the estimates


@torch.no_grad()
def variances(
    teacher: Teacher, streams: TokenStreams, options: argparse.Namespace
) -> dict[str, Any]:
    """Mean squared error Σ (p̂ - p)² of each form, over validation tokens and draws."""
    context, windows = options.context, max(1, 4096 // options.context)
    tokens = torch.from_numpy(streams.validation[: windows * context + 1].astype("int64"))
    tokens = tokens.to(teacher.device)
    hidden = teacher.hidden(tokens[:-1].view(windows, context)).flatten(0, 1)
    report: dict[str, Any] = {}
    for temperatures in ((1.0,), (1.0, 1.2), (2.0,)):
        for temperature in temperatures:
            name = f"T {temperature:g} of {', '.join(f'{t:g}' for t in temperatures)}"
            sums = dict.fromkeys(FORMS, 0.0)
            for part, labels in zip(hidden.split(512), tokens[1:].split(512), strict=True):
                logits = logits_of(teacher, part)
                p = torch.softmax(logits / temperature, -1)
                for form, make in FORMS.items():
                    for _ in range(options.draws):
                        uniform = torch.rand(2, len(labels), device=labels.device)
                        seen = Seen(logits, labels, uniform, temperature, temperatures)
                        targets = make(seen)
                        error = (-p).scatter_add_(1, targets.ids.long(), targets.weights)
                        sums[form] += float(error.square().sum())
            count = len(hidden) * options.draws
            report[name] = {form: round(total / count, 5) for form, total in sums.items()}
            say(f"  squared error at {name}: {report[name]}")
    return report


# ── the table


def table(losses: dict[str, dict[str, dict[str, float]]]) -> str:
    """By form: the mean over seeds, and how far it is from online, seed by seed."""
    schedules = list(losses)
    forms = list(dict.fromkeys(f for by in losses.values() for one in by.values() for f in one))
    lines = [
        "| validation loss | " + " | ".join(schedules) + " |",
        "|---|" + "---|" * len(schedules),
    ]
    for form in forms:
        cells = []
        for schedule in schedules:
            seeds = [one for one in losses[schedule].values() if form in one]
            if not seeds:
                cells.append("–")
                continue
            mean = statistics.mean(one[form] for one in seeds)
            gaps = ", ".join(f"{one[form] - one[ONLINE]:+.4f}" for one in seeds if ONLINE in one)
            cells.append(f"{mean:.4f}" + (f" ({gaps})" if form != ONLINE and gaps else ""))
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shape(text: str) -> tuple[int, int, int]:
    layers, width, heads = (int(piece) for piece in text.split("x"))
    return layers, width, heads


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=Path, required=True, help="of trainer.prepare_tokens")
    parser.add_argument("--teacher", type=Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--student", type=shape, default=(6, 512, 8), help="layers x width x heads")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32, help="of an update")
    parser.add_argument("--steps", type=int, default=1221, help="20 M tokens by default")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--schedules", nargs="*", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--forms", nargs="*", help="only those that have one of these words")
    parser.add_argument("--eval_tokens", type=int, default=524_288)
    parser.add_argument("--draws", type=int, default=4, help="for the variance; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args()


def main() -> None:
    options = parse()
    streams = open_streams(options.tokens)
    config = TrainConfig(block_size=options.context, eval_max_tokens=options.eval_tokens)
    precision = choose_precision(config)
    spec = read_teacher_spec(str(options.teacher))
    teacher = load_teacher(spec, dtype=precision.teacher, device=precision.device)
    teacher.prepare(compiled=precision.compiles(config), sharded=False)
    loss = Evaluator(config, streams, teacher, precision).teacher_loss(
        options.context, streams.info.vocab_size
    )
    say(f"teacher {options.teacher}: validation loss {loss:.4f} at {options.context}")
    report: dict[str, Any] = {"teacher": loss, "losses": {}}
    if options.draws:
        report["squared errors"] = variances(teacher, streams, options)
    for index, schedule in enumerate(options.schedules):
        forms = [CE] * (index == 0) + [ONLINE, *FORMS]
        if index == 0 and (spec.max_context or 0) >= 2 * options.context:
            forms.append(LONGER)
        if options.forms:
            forms = [f for f in forms if any(word in f for word in options.forms)]
        for seed in options.seeds:
            say(f"{schedule}, seed {seed}: {', '.join(forms)}")
            learners = Pupils(forms, seed, SCHEDULES[schedule], teacher, streams, options)
            found = learners.learn()
            report["losses"].setdefault(schedule, {})[str(seed)] = found
            say("  " + ", ".join(f"{form} {value:.4f}" for form, value in found.items()))
            del learners
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))
    print(table(report["losses"]))


if __name__ == "__main__":
    sys.exit(main())
