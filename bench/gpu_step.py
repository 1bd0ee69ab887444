"""The whole training step and the loss alone, beside other libraries, on one GPU.

    PYTHONPATH=trainer_image python bench/gpu_step.py --contexts 512 1024 --json gpu_step.json

gpt2-xl as the teacher and the default student, both with random weights: nothing is downloaded.
See bench/README.md for what the figures mean and which packages the peers need.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from measure import Timing, fresh_memory, gemm_roof, kernel_table, time_runs
from peers import Loss, PeerStep, full_logits, liger, orda, teacher_entropy, torchtune_chunked, trl
from stored_targets import Batch, StoredTargets, body_rate
from transformers import GPT2Config, GPT2LMHeadModel

from trainer.loss import chunked as distill
from trainer.loss import fused as fused_loss
from trainer.loss.chunked import Mix
from trainer.models.gpt2.export import gpt2_model
from trainer.models.student import Student, StudentConfig
from trainer.models.teacher import Teacher, TeacherSpec
from trainer.runtime.devices import has_fp8
from trainer.runtime.processes import Processes
from trainer.settings.config import TrainConfig
from trainer.targets.records import Layout
from trainer.training.precision import choose_precision
from trainer.training.step import TrainStep

VOCABULARY = 50257
STUDENT = StudentConfig(VOCABULARY, d_model=768, n_layers=10, n_heads=12, positions=4096)
RATE = 1e-4
OURS, OURS_FP8 = "this trainer", "this trainer, fp8 teacher"
CE_ALONE, STORED = "this trainer, CE alone", "this trainer, stored targets"
TORCHTUNE = "torchtune, chunked KL"
PEERS: dict[str, Callable[[float, float], Loss]] = {
    "Hugging Face, full logits": full_logits,
    TORCHTUNE: torchtune_chunked,
    "Liger, chunks of 4096": liger,
    "TRL, generalized JSD": trl,
}
LOSS_PEERS: dict[str, Callable[[float, float], Loss]] = {
    **PEERS,
    "Liger, chunks of 1024": lambda alpha, temperature: liger(alpha, temperature, 1024),
    "orda-kernel": orda,
}


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s] {text}", flush=True)


STARTED = time.perf_counter()


def flop_per_token(teacher: GPT2Config, context: int) -> float:
    """Of the products: teacher forward, student forward and backward, causal attention halved."""
    width, layers = teacher.n_embd, teacher.n_layer
    body = 12 * layers * width**2 + layers * width * context
    student = 12 * STUDENT.n_layers * STUDENT.d_model**2
    student += STUDENT.n_layers * STUDENT.d_model * context
    heads = VOCABULARY * (2 * width + 6 * STUDENT.d_model)
    return 2 * body + 6 * student + heads


def build_teacher(options: argparse.Namespace) -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=1600, n_layer=options.teacher_layers, n_head=25)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


FAILURES: list[str] = []
"""What could not be compared; reported at the end as a failure of the whole."""


def same_loss(name: str, found: Tensor, expected: float, limit: float = 5e-3) -> bool:
    value = float(found.detach())
    error = abs(value - expected) / expected
    say(f"  {name}: loss {value:.5f}, {error:.1e} from the reference")
    if error <= limit:
        return True
    FAILURES.append(f"{name} computes another loss: {value:.5f}, not {expected:.5f}")
    return False


def built(name: str, build: Callable[[float, float], Loss], mix: Mix) -> Loss | None:
    """A peer's loss, or None where its package is missing."""
    try:
        return build(mix.alpha, mix.temperature)
    except ImportError as error:
        FAILURES.append(f"{name} was left out: {error}")
        return None


# ── the loss alone ────────────────────────────────────────────────────────────────────────────


def bench_loss(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Both heads, CE + forward KL, backward to the student's hidden state and head."""
    mix = Mix(options.alpha, options.temperature)
    generator = torch.Generator("cuda").manual_seed(1)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda") * scale

    tokens = options.tokens
    hidden = draw(tokens, STUDENT.d_model).bfloat16().requires_grad_()
    head = draw(VOCABULARY, STUDENT.d_model, scale=0.02).requires_grad_()
    t_hidden, t_head = draw(tokens, 1600).bfloat16(), draw(VOCABULARY, 1600, scale=0.02).bfloat16()
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator, device="cuda")
    with torch.no_grad():
        expected = distill.distill_loss(
            hidden.float(), head, t_hidden.float(), t_head.float(), labels, mix
        )

    def ours(h: Tensor, w: Tensor, th: Tensor, tw: Tensor, y: Tensor) -> Tensor:
        return fused_loss.distill_loss(h, w, th, tw, y, mix).loss

    soft_weight = mix.alpha * mix.temperature**2
    for name, build in {OURS: lambda *_: ours, **LOSS_PEERS}.items():
        with fresh_memory():
            loss = built(name, build, mix)
            if loss is None:
                continue

            def run(loss: Loss = loss) -> None:
                hidden.grad = head.grad = None
                loss(hidden, head, t_hidden, t_head, labels).backward()

            value = loss(hidden, head, t_hidden, t_head, labels).detach()
            if name == TORCHTUNE:
                value -= soft_weight * teacher_entropy(t_hidden, t_head, mix.temperature)
            if not same_loss(name, value, float(expected.loss)):
                continue
            hidden.grad = head.grad = None
            timing = time_runs(run, runs=options.runs)
            hidden.grad = head.grad = None
        record(report, "loss alone", name, timing, tokens)


# ── the whole step ────────────────────────────────────────────────────────────────────────────


def draw_batch(context: int, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a step, the same for every variant."""
    generator = torch.Generator("cuda").manual_seed(2)
    shape = (options.tokens // context, context + 1)
    stream = torch.randint(0, VOCABULARY, shape, generator=generator, device="cuda")
    return stream[:, :-1].contiguous(), stream[:, 1:].contiguous()


def bench_step(
    context: int, model: Any, roof: float, options: argparse.Namespace, report: dict[str, Any]
) -> None:
    """This trainer's own step, then the peers', from the same weights on the same batch."""
    section = f"step at context {context}"
    ids, labels = draw_batch(context, options)
    flops = flop_per_token(model.config, context)
    teacher = Teacher(model, TeacherSpec("gpt2-xl", 1024, VOCABULARY))
    teacher.prepare(compiled=True, sharded=False)
    with fresh_memory():
        expected = own_step((section, OURS), teacher, (ids, labels), options, report, (flops, roof))
    bench_stored(section, "bf16", context, teacher, options, report)
    del teacher
    body = torch.compile(model.transformer, dynamic=False)
    weights = Student(STUDENT).initialize(0).state_dict()
    student = gpt2_model(weights, STUDENT, STUDENT.positions).cuda().train()
    start = {key: value.cpu() for key, value in student.state_dict().items()}
    student_body = torch.compile(student.transformer, dynamic=False)
    for name, build in PEERS.items():
        if options.peers and not any(word.lower() in name.lower() for word in options.peers):
            continue
        student.load_state_dict(start)
        with fresh_memory():
            loss = built(name, build, Mix(options.alpha, options.temperature))
            if loss is None:
                continue
            peer = PeerStep(student, (student_body, body), model.lm_head.weight, loss, RATE)
            if not agrees(name, peer, ids, labels, expected, options):
                continue
            timing = time_runs(partial(peer.step, ids, labels), runs=options.runs)
            del peer, loss
        record(report, section, name, timing, options.tokens, flops=flops, roof=roof)


def bench_fp8(roof: float, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """This trainer's step with the teacher's products in fp8: not the same maths as the others."""
    model = build_teacher(options)
    config = model.config
    teacher = Teacher(model, TeacherSpec("gpt2-xl", 1024, VOCABULARY))
    error = teacher.quantize(draw_batch(512, options)[0][:16])
    report["fp8 teacher, random weights"] = asdict(error)
    say(f"fp8 teacher of random weights: {error}")
    for context in options.contexts:
        torch._dynamo.reset()
        section, flops = f"step at context {context}", flop_per_token(config, context)
        with fresh_memory():
            teacher.release()
            batch = draw_batch(context, options)
            own_step((section, OURS_FP8), teacher, batch, options, report, (flops, roof))
        teacher.release()
        bench_writing(section, "fp8", context, teacher, options, report)


def bench_stored(
    section: str,
    precision: str,
    context: int,
    teacher: Teacher,
    options: argparse.Namespace,
    report: dict[str, Any],
) -> None:
    """The step on CE alone and from targets that are read from disk."""
    stored = bench_writing(section, precision, context, teacher, options, report)
    teacher.release()
    windows = options.tokens // context
    for name, alpha in ((CE_ALONE, 0.0), (STORED, options.alpha)):
        with fresh_memory():
            step = built_step(None, windows, context, stored.index.made.layout)
            batches = stored.batches(context, windows)
            mix = Mix(alpha, options.temperature)
            # Longer than of the others: what is read ahead must not be all that is measured
            runs = max(options.runs, 100)
            timing = time_runs(partial(one_step, step, batches, mix), runs=runs, warmup=20)
            kinds, _ = kernel_table(partial(one_step, step, batches, mix))
            del step
        record(report, section, name, timing, options.tokens)
        for kind, duration in kinds.items():
            say(f"    {duration:7.2f} ms  {kind}")
    ratio = report[section][STORED]["tokens/s"] / report[section][CE_ALONE]["tokens/s"]
    report[section]["stored targets to CE alone"] = round(ratio, 3)
    say(f"  {section} · from stored targets at {ratio:.3f} of the speed of CE alone")


def bench_writing(
    section: str,
    precision: str,
    context: int,
    teacher: Teacher,
    options: argparse.Namespace,
    report: dict[str, Any],
) -> StoredTargets:
    """Targets a second, beside the teacher's body alone."""
    alone = body_rate(teacher, context, options.tokens, options.runs)
    stored = StoredTargets(
        teacher,
        options.targets,
        tokens=options.target_tokens,
        context=context,
        temperatures=tuple(sorted({1.0, options.temperature})),
    )
    rate = stored.tokens_per_second
    report.setdefault(section, {})[f"targets, {precision} teacher"] = {
        "tokens/s": round(rate),
        "body alone tokens/s": round(alone),
        "share": round(rate / alone, 3),
    }
    say(f"  {section} · {precision}: {rate:,.0f} targets/s, {rate / alone:.3f} of the body alone")
    return stored


def agrees(
    name: str,
    peer: PeerStep,
    ids: Tensor,
    labels: Tensor,
    expected: float,
    options: argparse.Namespace,
) -> bool:
    value = peer.forward(ids, labels).detach()
    if name == TORCHTUNE:
        entropy = teacher_entropy(peer.targets(ids), peer.teacher_head, options.temperature)
        value -= options.alpha * options.temperature**2 * entropy
    return same_loss(name, value, expected)


def own_step(
    place: tuple[str, str],
    teacher: Teacher,
    batch: tuple[Tensor, Tensor],
    options: argparse.Namespace,
    report: dict[str, Any],
    rates: tuple[float, float],
) -> float:
    """Times the product's own step; returns the loss of the untrained student."""
    section, name = place
    # From where the training loop has them
    ids, labels = (part.cpu().pin_memory() for part in batch)
    step = built_step(teacher, *ids.shape)
    mix = Mix(options.alpha, options.temperature)
    run = partial(one_step, step, itertools.repeat((ids, labels, None)), mix)
    first = float(run())
    say(f"  {name}: loss {first:.5f} before the first update")
    timing = time_runs(run, runs=options.runs)
    record(report, section, name, timing, ids.numel(), flops=rates[0], roof=rates[1])
    kinds, longest = kernel_table(run)
    report[section][f"kernels of {name}, ms"] = {kind: round(ms, 2) for kind, ms in kinds.items()}
    for kind, duration in kinds.items():
        say(f"    {duration:7.2f} ms  {kind}")
    print("\n".join(longest), flush=True)
    return first


def built_step(
    teacher: Teacher | None, windows: int, context: int, layout: Layout | None = None
) -> TrainStep:
    """The product's own step, with the default student."""
    config = TrainConfig(
        teacher_name="gpt2-xl",
        dataset_name="random",
        block_size=context,
        micro_batch=windows,
        global_batch=windows,
        grad_accum=1,
        bf16=True,
        compile="on",
    )
    device = torch.device("cuda")
    student, processes = Student(STUDENT).initialize(0), Processes(device=device)
    precision = choose_precision(config, device)
    return TrainStep(config, student, teacher, precision, processes, {}, layout)


def one_step(step: TrainStep, batches: Iterator[Batch], mix: Mix) -> Tensor:
    """An update; returns its loss."""
    ids, labels, records = next(batches)
    output = step.micro_step(ids, labels, mix, records=records, accumulation=1, last=True)
    step.update(RATE)
    for _ in step.outcomes(wait=False):
        pass
    return output.loss.detach()


def record(
    report: dict[str, Any],
    section: str,
    name: str,
    timing: Timing,
    tokens: int,
    *,
    flops: float | None = None,
    roof: float | None = None,
) -> None:
    rate = tokens / timing.median * 1e3
    entry: dict[str, Any] = {
        "median ms": round(timing.median, 2),
        "quartiles ms": [round(q, 2) for q in statistics.quantiles(timing.runs, n=4)[::2]],
        "tokens/s": round(rate),
        "mean tokens/s": round(tokens / statistics.mean(timing.runs) * 1e3),
        "peak GiB": round(timing.peak_gib, 2),
        "extra GiB": round(timing.extra_gib, 2),
    }
    if flops is not None and roof is not None:
        entry["of the GEMM roof"] = round(rate * flops / roof / 1e12, 3)
    report.setdefault(section, {})[name] = entry
    say(f"  {section} · {name}: " + ", ".join(f"{key} {value}" for key, value in entry.items()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 1024])
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of a step")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--teacher_layers", type=int, default=48, help="fewer for a quick look")
    parser.add_argument("--peers", nargs="*", help="only peers with one of these words")
    parser.add_argument("--no_loss", action="store_true", help="leave out the loss alone")
    parser.add_argument("--no_fp8", action="store_true", help="leave out the fp8 teacher")
    parser.add_argument("--targets", type=Path, default=Path("/tmp/bench_targets"))
    parser.add_argument("--target_tokens", type=int, default=2_097_152, help="that are stored")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser.parse_args()


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; torch sees none")
    roof = gemm_roof()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "GEMM roof, TFLOP/s": round(roof, 1),
    }
    say(f"{report['device']}, torch {torch.__version__}, bf16 GEMM roof {roof:.0f} TFLOP/s")
    if not options.no_loss:
        with fresh_memory():
            bench_loss(options, report)
    if options.contexts:
        model = build_teacher(options)
        for context in options.contexts:
            torch._dynamo.reset()
            with fresh_memory():
                bench_step(context, model, roof, options, report)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1))
        del model
        if not options.no_fp8 and has_fp8(torch.device("cuda")):
            with fresh_memory():
                bench_fp8(roof, options, report)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    if FAILURES:
        sys.exit("\n".join(FAILURES))


if __name__ == "__main__":
    main()
