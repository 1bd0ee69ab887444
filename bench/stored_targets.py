"""Stored targets of random tokens for `gpu_step.py`: made by the trainer, and read from disk."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import time_runs
from torch import Tensor

from trainer.data.batches import BatchSampler, prefetched
from trainer.data.streams import TokenInfo, TokenStreams
from trainer.models.teacher import Teacher
from trainer.storage.places import open_location
from trainer.targets.making import join, make
from trainer.targets.reading import Targets
from trainer.targets.shards import ESTIMATOR, Index, MadeWith

Batch = tuple[Tensor, Tensor, Tensor | None]


class StoredTargets:
    """Targets at a directory, and how long it took to make them.

    Args:
        teacher: prepared, on the GPU.
        directory: emptied first.
        tokens: of the stream, which are random.
        context: of the teacher.
        temperatures: at which the estimates are unbiased.
    """

    def __init__(
        self,
        teacher: Teacher,
        directory: Path,
        *,
        tokens: int,
        context: int,
        temperatures: tuple[float, ...],
        record_bytes: int = 64,
    ) -> None:
        vocabulary = teacher.spec.vocab_size
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        drawn = np.random.default_rng(0).integers(0, vocabulary, tokens + 1, dtype=np.uint16)
        info = TokenInfo(
            tokens + 1, context + 1, vocabulary, "uint16", 0, "random", {}, "random", "random"
        )
        self.streams = TokenStreams(directory, info, drawn, drawn[: context + 1])
        made = MadeWith(
            tokens="random",
            tokenizer="",
            train_tokens=tokens + 1,
            validation_tokens=context + 1,
            teacher="random",
            teacher_digest="random",
            teacher_precision="bfloat16",
            vocabulary=vocabulary,
            teacher_context=context,
            temperatures=temperatures,
            record_bytes=record_bytes,
            seed=0,
            estimator=ESTIMATOR,
            contexts=(context,),
        )
        location, names = open_location(str(directory)), list(made.files)
        # The first shard compiles; the others are timed
        make(location, made, [names[-1], names[0]], self.streams, teacher)
        torch.cuda.synchronize()
        began = time.perf_counter()
        make(location, made, names[1:-1], self.streams, teacher)
        torch.cuda.synchronize()
        timed = sum(len(made.windows_of(shard)) for shard in range(1, made.shards)) * context
        self.tokens_per_second = timed / (time.perf_counter() - began)
        self.index: Index = join(str(directory), [str(directory)])
        self.directory = directory

    def batches(self, context: int, windows: int) -> Iterator[Batch]:
        """Micro-batches as the training loop has them: inputs, labels and records, all pinned."""
        sampler = BatchSampler(
            self.streams.train,
            block_size=context,
            global_batch=windows,
            micro_batch=windows,
            seed=0,
        )
        targets = Targets(self.index, context, 0, self.directory, copying=False)
        steps = range(1_000_000)
        records = targets.batches((sampler.window_indices(k, 0) for k in steps), pinned=True)

        def prepare(step: int) -> Batch:
            inputs, labels = sampler.batch(step, 0)
            return inputs.pin_memory(), labels.pin_memory(), next(records)

        return prefetched(prepare, steps)


def body_rate(teacher: Teacher, context: int, tokens: int, runs: int) -> float:
    """Tokens a second of the teacher's body alone, a pass having ``tokens``."""
    shape = (tokens // context, context)
    ids = torch.randint(0, teacher.spec.vocab_size, shape, device=teacher.device)
    timing = time_runs(lambda: teacher.hidden(ids), runs=runs)
    return tokens / timing.median * 1e3
