"""The largest micro-batch that fits the GPU, for ``--micro_batch=auto``."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from trainer.loss.chunked import Mix
from trainer.models.student import Student
from trainer.models.teacher import Teacher
from trainer.runtime.errors import TrainingError
from trainer.runtime.log import log
from trainer.runtime.processes import Processes
from trainer.settings.config import DEFAULT_MICRO_BATCH, TrainConfig
from trainer.targets.records import Layout
from trainer.training.precision import Precision
from trainer.training.step import TrainStep

MOST_TOKENS = 65_536
"""Most tokens of a micro-batch: a GPU is busy with fewer, and more make no update faster."""

FITTED_TOKENS = 4096
"""Fewest tokens for fitting memory against size: below, the loss takes all in one chunk."""

MEMORY_SHARE = 0.92
"""Of the memory free at the start; the rest is for evaluation and fragmentation."""

_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")
"""In the errors of CUDA, Triton and cuBLAS, which are not torch's own out-of-memory error."""


def resolve_micro_batch(
    config: TrainConfig,
    student: Student,
    teacher: Teacher | None,
    precision: Precision,
    processes: Processes,
    layout: Layout | None = None,
) -> TrainConfig:
    """The configuration with ``micro_batch`` and ``grad_accum`` in place of ``auto``.

    ``layout`` is that of the records that come in place of a teacher.

    On a GPU, forward and backward passes over random tokens measure the memory; the student's
    weights stay as they are. On the CPU, it is the largest divisor up to the default.

    Raises:
        TrainingError: not even one window fits.
    """
    windows = config.global_batch // processes.world_size
    sizes = candidates(windows, config.context)
    if precision.device.type != "cuda":
        chosen = max(size for size in sizes if size <= DEFAULT_MICRO_BATCH)
        log.info(
            "micro_batch auto: %d windows per pass (on the CPU at most %d)",
            chosen,
            DEFAULT_MICRO_BATCH,
        )
    else:
        trial = _Trial(config, student, teacher, precision, processes, layout)
        limit = trial.memory_limit()
        fitting, expected = choose(sizes, trial.peak, limit, config.context)
        chosen = processes.min(fitting)
        if processes.world_size > 1:
            # DDP compiles a body in parts, to exchange gradients during the backward pass. Without
            # this, it would reuse what a trial compiled in one piece
            torch._dynamo.reset()
        memory = f"{expected / 2**30:.1f} of {limit / MEMORY_SHARE / 2**30:.1f} GiB expected"
        log.info(
            "micro_batch auto: %d windows (%d tokens) per pass, %d passes per update; %s",
            chosen,
            chosen * config.context,
            windows // chosen,
            memory if chosen == fitting else "another process has no room for more",
        )
    return replace(config, micro_batch=chosen, grad_accum=windows // chosen)


def candidates(windows: int, context: int) -> list[int]:
    """The divisors of a process's ``windows`` per update, ascending, up to `MOST_TOKENS`."""
    return [
        size
        for size in range(1, windows + 1)
        if windows % size == 0 and (size == 1 or size * context <= MOST_TOKENS)
    ]


def choose(
    sizes: Sequence[int], peak: Callable[[int], int | None], limit: int, context: int
) -> tuple[int, int]:
    """The largest size whose measured peak is within the limit, and that peak.

    Memory is close to linear in the size. Two measured sizes give a line, which says where to try
    next; the size returned has been measured too. Each try costs a compilation, so few are made.

    Args:
        sizes: windows per pass, ascending.
        peak: bytes that a size needs; None where the GPU ran out of memory.
        limit: bytes.
        context: tokens of a window.

    Raises:
        TrainingError: the smallest size is over the limit.
    """
    known: dict[int, int] = {}
    refused = math.inf

    def fits(size: int) -> bool:
        nonlocal refused
        needed = peak(size)
        if needed is None or needed > limit:
            refused = min(refused, size)
            return False
        known[size] = needed
        return True

    start = next((i for i, size in enumerate(sizes) if size * context >= FITTED_TOKENS), 0)
    while not fits(sizes[start]):
        if start == 0:
            raise TrainingError(
                f"not even one window of {context} tokens fits in {limit / 2**30:.1f} GiB of GPU"
                " memory; give --activation_checkpointing, a smaller --block_size or a smaller"
                " student"
            )
        start -= 1
    larger = [size for size in sizes[start + 1 :] if size < refused]
    if larger and fits(larger.pop(0)):
        (low, below), (high, above) = sorted(known.items())[-2:]
        slope = (above - below) / (high - low)
        reachable = [size for size in larger if above + slope * (size - high) <= limit]
        while reachable and not fits(reachable.pop()):
            pass
    best = max(known)
    return best, known[best]


class _Trial:
    """Forward and backward passes that measure how much memory they take."""

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        teacher: Teacher | None,
        precision: Precision,
        processes: Processes,
        layout: Layout | None = None,
    ) -> None:
        self.device = precision.device
        self.context = config.context
        self.vocabulary = student.config.vocab_size
        # Set up for one process: trials exchange nothing, so processes may try different sizes
        alone = Processes(device=precision.device)
        self.teacher = teacher
        self.step = TrainStep(config, student, teacher, precision, alone, {}, layout)
        self.layout = layout
        alpha = max(config.schedule_alpha.values())
        self.mix = Mix(alpha, config.schedule_T.at(0), config.kd_scheme)
        self.generator = torch.Generator().manual_seed(0)
        # AdamW's two moments; with DDP its buckets too, beside the gradients accumulated so far
        words = 2 if processes.world_size == 1 else 3
        self.later = 4 * words * sum(parameter.numel() for parameter in student.parameters())
        """Bytes that training allocates and a trial does not."""

    def memory_limit(self) -> int:
        """Bytes that this process may allocate, including those that it holds already."""
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = total * torch.cuda.get_per_process_memory_fraction()
        return int(MEMORY_SHARE * min(free + torch.cuda.memory_reserved(self.device), allowed))

    def peak(self, size: int) -> int | None:
        """Bytes of an update in passes of ``size`` windows; None where memory ran out."""
        # Past the limit, torch silently runs further shapes uncompiled; a trial's shape must not
        # count against those of training and evaluation
        torch._dynamo.config.recompile_limit += 1
        try:
            needed = self._measure(size)
            log.info("micro_batch auto: %d windows need %.1f GiB", size, needed / 2**30)
            return needed
        except RuntimeError as error:
            if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise
            log.info("micro_batch auto: %d windows do not fit", size)
            return None
        finally:
            self.release()

    def _measure(self, size: int) -> int:
        shape = (size, self.context)
        ids = torch.randint(0, self.vocabulary, shape, generator=self.generator)
        records = None
        if self.layout is not None:
            records = torch.zeros((*shape, self.layout.record_bytes), dtype=torch.uint8)
        if self.device.type == "cuda":
            ids = ids.pin_memory()
            records = None if records is None else records.pin_memory()
        # Dropout draws random numbers; those of the run must not depend on the search
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # The first pass also compiles; the second adds to gradients, as most passes do
            for _ in range(2):
                torch.cuda.synchronize(self.device)
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(self.device)
                self.step.micro_step(
                    ids, ids, self.mix, records=records, accumulation=2, last=False
                )
        torch.cuda.synchronize(self.device)
        # Reserved, not allocated: the student's stream cannot reuse the teacher's blocks
        return torch.cuda.max_memory_reserved(self.device) + self.later

    def release(self) -> None:
        """Free a trial's memory: gradients, the last batch and the teacher's buffers."""
        self.step.optimizer.zero_grad(set_to_none=True)
        self.step.feed.release()
        if self.teacher is not None:
            self.teacher.release()
        gc.collect()
        torch.cuda.empty_cache()
        # The peak that the run logs must not be a trial's
        torch.cuda.reset_peak_memory_stats(self.device)
