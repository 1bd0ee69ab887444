"""Times, memory, and the table of kernels of one step, on one GPU."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

KINDS = (
    # First match wins; attention and fused kernels also carry words of the kinds after them
    ("attention", ("flash", "fmha", "sdpa", "attention")),
    ("loss kernel", ("_loss_and_gradient",)),
    ("layer norm", ("_layer_norm", "_norm_quantized")),
    ("GELU to fp8", ("_gelu_quantized",)),
    ("optimizer", ("adam", "multi_tensor", "lpnorm")),
    ("GEMM", ("nvjet", "gemm", "cutlass", "splitk", "cublas")),
    ("compiled elementwise", ("triton",)),
    ("copies and fills", ("memcpy", "memset", "copy", "fill")),
)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of repeated runs, and memory."""

    runs: list[float]
    peak_gib: float
    """Highest allocation, in all."""
    extra_gib: float
    """The same above what was allocated before."""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> str:
        return f"{min(self.runs):.1f}-{max(self.runs):.1f}"


def time_runs(run: Callable[[], Any], *, runs: int, warmup: int = 3) -> Timing:
    """Median over runs that follow each other with nothing in between, as in training."""
    for _ in range(warmup):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return Timing(
        [start.elapsed_time(end) for start, end in itertools.pairwise(marks)],
        peak / 2**30,
        (peak - before) / 2**30,
    )


def gemm_roof() -> float:
    """TFLOP/s of a large bf16 product of random numbers."""
    left, right = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    timing = time_runs(lambda: left @ right, runs=30, warmup=10)
    return 2 * 8192**3 / timing.median / 1e9


def kernel_table(run: Callable[[], Any], *, top: int = 14) -> tuple[dict[str, float], list[str]]:
    """One run's device time: by kind in milliseconds, gaps included, and its longest kernels."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == DeviceType.CUDA]
    kinds: dict[str, float] = {}
    names: dict[str, tuple[float, int]] = {}
    for event in events:
        duration = event.time_range.elapsed_us() / 1e3
        lowered = event.name.lower()
        kind = next((k for k, words in KINDS if any(w in lowered for w in words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + duration
        total, count = names.get(event.name, (0.0, 0))
        names[event.name] = (total + duration, count + 1)
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    kinds["gaps"] = span / 1e3 - sum(kinds.values())
    longest = sorted(names.items(), key=lambda item: -item[1][0])[:top]
    lines = [f"{total:8.2f} ms {count:5d} × {name[:88]}" for name, (total, count) in longest]
    return dict(sorted(kinds.items(), key=lambda item: -item[1])), lines


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Leave no tensors of a variant behind for the next one."""
    import gc

    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()
