"""How fast GPUs train and run the networks: what was measured, and what follows from it.

Each row was measured on one GPU with 16,384 tokens an update (bench/README.md). For anything else,
the time of a token is its floating-point operations over a share of the GPU's peak, and something
for each forward and backward pass, of which smaller micro-batches need more. The shares are those
of the rows; on another GPU they are taken to be the same, which was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.estimates.networks import Network

ONLINE, ALONE, STORED, MAKING = "online", "alone", "stored", "making"
"""A student with its teacher; at alpha 0; on stored targets; the teacher that makes them."""

PEAKS = {"T4": 65e12, "V100": 125e12, "L4": 121e12, "A100": 312e12, "H100": 989e12, "H200": 989e12}
"""Dense FLOP/s in bf16 as published; in fp16 for T4 and V100, which have no bf16."""
_GPUS = {
    "NVIDIA_TESLA_T4": "T4",
    "NVIDIA_TESLA_V100": "V100",
    "NVIDIA_L4": "L4",
    "NVIDIA_TESLA_A100": "A100",
    "NVIDIA_A100_80GB": "A100",
    "NVIDIA_H100_80GB": "H100",
    "NVIDIA_H100_MEGA_80GB": "H100",
    "NVIDIA_H200_141GB": "H200",
}
FP8 = ("H100", "H200", "L4")
"""GPUs that multiply in fp8."""

STUDENT_SHARE = 0.40
TEACHER_SHARE, TEACHER_SHARE_FP8 = 0.60, 0.77
"""Beside a student; in fp8 of the bf16 peak too."""
MAKING_SHARE, MAKING_SHARE_FP8 = 0.54, 0.69
"""Less, since targets are drawn too."""
PASS_SECONDS = 5e-3
"""What a pass takes beside its operations; the shares hold it for passes of `FULL_PASS` tokens."""
FULL_PASS = 16_384
STORED_COST = 1.02
"""Training on stored targets over training at alpha 0."""

SCALING = {"ddp": 0.96, "fsdp": 0.76, "shard_teacher": 0.59}
"""Speed of each GPU among two of one host over that of one alone, by ``parallel``."""
MACHINES_SCALING = 0.85
"""The same for each further level, several machines: assumed, not measured."""

FRESH_SECONDS, COMPILED_SECONDS = 29.0, 16.0
"""What a training stage took on an H100 beside training: without compiled code, and with that of an
earlier stage."""
RUN_SECONDS = 20.0
"""What a stage takes that runs networks and does not train: assumed."""

MEASURED_FACTOR, RULE_FACTOR, OTHER_GPU_FACTOR, ASSUMED_FACTOR = 1.1, 1.25, 2.0, 2.0
"""By how much a time may be off, up or down. The rule meets every measured row within its own."""


@dataclass(frozen=True)
class Row:
    """Tokens a second of one GPU, as measured. Shapes are (layers, width) at 50,257 tokens."""

    gpu: str
    work: str
    context: int
    tokens_per_second: float
    student: tuple[int, int] | None = (10, 768)
    teacher: tuple[int, int] | None = None
    fp8: bool = False
    pass_tokens: int = FULL_PASS
    """Of a micro-batch."""


_XL = (48, 1600)
MEASURED = (
    Row("H100", ONLINE, 512, 141_000, teacher=_XL),
    Row("H100", ONLINE, 1024, 137_000, teacher=_XL),
    Row("H100", ONLINE, 512, 167_900, teacher=_XL, fp8=True),
    Row("H100", ONLINE, 1024, 160_300, teacher=_XL, fp8=True),
    Row("H200", ONLINE, 512, 141_000, teacher=_XL),
    Row("H100", ONLINE, 512, 125_600, teacher=_XL, pass_tokens=4096),
    Row("H100", ONLINE, 1024, 125_100, teacher=_XL, pass_tokens=8192),
    Row("H100", ONLINE, 512, 317_600, teacher=(24, 1024)),
    Row("H100", ONLINE, 512, 359_200, teacher=(16, 1024)),
    Row("H100", ONLINE, 512, 458_100, student=(6, 512), teacher=(24, 1024)),
    Row("H100", ALONE, 512, 380_500, pass_tokens=4096),
    Row("H100", ALONE, 512, 1_199_900, student=(6, 512)),
    Row("H100", ALONE, 512, 560_000),
    Row("H100", ALONE, 1024, 543_000),
    Row("H100", ALONE, 1024, 268_000, student=(16, 1024)),
    Row("H100", STORED, 512, 548_000),
    Row("H100", STORED, 1024, 537_000),
    Row("H100", MAKING, 512, 170_200, student=None, teacher=_XL),
    Row("H100", MAKING, 1024, 164_700, student=None, teacher=_XL),
    Row("H100", MAKING, 512, 217_700, student=None, teacher=_XL, fp8=True),
    Row("H100", MAKING, 1024, 207_500, student=None, teacher=_XL, fp8=True),
)
_MEASURED_VOCABULARY = 50_257


@dataclass(frozen=True)
class Work:
    """What is done with each token."""

    kind: str
    context: int
    student: Network | None = None
    teacher: Network | None = None
    fp8: bool = False
    """The teacher's precision."""
    usual: bool = True
    """Whether all settings that change the speed are as they were measured."""
    pass_tokens: int = FULL_PASS
    """Of a micro-batch; more than `FULL_PASS` gain nothing."""
    recomputed: bool = False
    """Whether the backward pass computes the student's activations again."""


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one GPU, how that is known, and by what factor it may be off."""

    tokens_per_second: float
    known: str
    factor: float


def gpu_of(accelerator_type: str) -> str:
    """A GPU's short name by Vertex AI's; empty where nothing is known of its speed."""
    return _GPUS.get(accelerator_type, "")


def speed(gpu: str, work: Work) -> Speed:
    """As measured where it was, else by floating-point operations.

    Args:
        gpu: one of `PEAKS`.
        work: what it does.
    """
    if work.usual:
        for row in MEASURED:
            if _matches(row, gpu, work) and row.pass_tokens == min(work.pass_tokens, FULL_PASS):
                return Speed(row.tokens_per_second, "measured", MEASURED_FACTOR)
        for row in MEASURED:
            if _matches(row, gpu, work) and row.pass_tokens == FULL_PASS:
                rate = 1.0 / (1.0 / row.tokens_per_second + _smaller_passes(work))
                return Speed(rate, "measured with larger micro-batches", RULE_FACTOR)
    near = gpu in ("H100", "H200")
    known = "by FLOPs" if near else f"by FLOPs, {gpu} not measured"
    return Speed(by_flops(gpu, work), known, RULE_FACTOR if near else OTHER_GPU_FACTOR)


def _smaller_passes(work: Work) -> float:
    """Seconds more for each token than in passes of `FULL_PASS` tokens."""
    return PASS_SECONDS * max(0.0, 1.0 / work.pass_tokens - 1.0 / FULL_PASS)


def _matches(row: Row, gpu: str, work: Work) -> bool:
    teacher = work.teacher if work.kind in (ONLINE, MAKING) else None
    return (row.gpu, row.work, row.context, row.fp8, row.student, row.teacher) == (
        gpu,
        work.kind,
        work.context,
        work.fp8 and teacher is not None,
        _shape(work.student),
        _shape(teacher),
    )


def _shape(network: Network | None) -> tuple[int, int] | None:
    if network is None:
        return None
    if network.vocabulary != _MEASURED_VOCABULARY:
        return (0, 0)
    return network.layers, network.width


def by_flops(gpu: str, work: Work) -> float:
    """Tokens a second of one GPU by the rule."""
    peak = PEAKS[gpu]
    seconds = 0.0
    if work.student is not None:
        flops = work.student.training_flops(work.context)
        if work.recomputed:
            flops += work.student.forward_flops(work.context)
        seconds += flops / (STUDENT_SHARE * peak)
    if work.kind == STORED:
        seconds *= STORED_COST
    if work.kind in (ONLINE, MAKING):
        assert work.teacher is not None
        fp8 = work.fp8 and gpu in FP8
        share = TEACHER_SHARE_FP8 if fp8 else TEACHER_SHARE
        if work.kind == MAKING:
            share = MAKING_SHARE_FP8 if fp8 else MAKING_SHARE
        seconds += work.teacher.forward_flops(work.context) / (share * peak)
    return 1.0 / (seconds + _smaller_passes(work))


def scoring_seconds(gpu: str, network: Network, context: int, *, teacher: bool) -> float:
    """Seconds in which one GPU evaluates a token, by the rule."""
    share = TEACHER_SHARE if teacher else STUDENT_SHARE
    return network.forward_flops(context) / (share * PEAKS[gpu])
