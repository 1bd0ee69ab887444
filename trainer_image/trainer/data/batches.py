"""Windows of a token stream, and which of them make up each batch."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.runtime.errors import DataError

_PREFETCHED = 4
"""Micro-batches prepared ahead of the one in use."""
_PATIENCE = 1.0
"""Seconds."""

Prepared = TypeVar("Prepared")

IGNORED = -1
"""Label of a position that fills up an evaluation batch and counts for nothing."""


def window_count(stream: np.ndarray, block_size: int) -> int:
    """Whole windows in a stream: each needs ``block_size`` inputs and one label more."""
    return max(0, (len(stream) - 1) // block_size)


class BatchSampler:
    """The windows of every update, as a pure function of (seed, epoch, step, rank).

    Update ``k`` takes the windows at places ``k · global_batch …`` of an endless sequence: the
    windows in a random order, then in another, and so on. How these are divided among processes
    and micro-batches does not change which they are.
    """

    def __init__(
        self,
        stream: np.ndarray,
        *,
        block_size: int,
        global_batch: int,
        micro_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream = stream
        self.block_size = block_size
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.windows = window_count(stream, block_size)
        if self.windows == 0:
            raise DataError(
                f"{len(stream)} training tokens do not fill one window of {block_size} + 1; give a"
                " larger data set or a smaller --block_size"
            )
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def window_indices(self, step: int, micro_step: int) -> np.ndarray:
        """Indices ``[micro_batch]`` of the windows of one micro-batch of this rank."""
        first = (
            step * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
        )
        return np.array(
            [self._window_at(place) for place in range(first, first + self.micro_batch)],
            dtype=np.int64,
        )

    def _window_at(self, place: int) -> int:
        epoch, index = divmod(place, self.windows)
        if self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.windows)
            self._order = (epoch, order)
        return int(self._order[1][index])

    def batch(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels, each ``[micro_batch, block_size]`` int64, on the CPU."""
        tokens = np.empty((self.micro_batch, self.block_size + 1), dtype=np.int64)
        for row, index in enumerate(self.window_indices(step, micro_step)):
            start = index * self.block_size
            tokens[row] = self.stream[start : start + self.block_size + 1]
        windows = torch.from_numpy(tokens)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def prefetched(
    prepare: Callable[[int], Prepared],
    places: range,
    waiting: Callable[[], None] = lambda: None,
) -> Generator[Prepared, None, None]:
    """``prepare(place)`` for each place in order; a thread works some places ahead.

    ``waiting`` is called once a second while one is being waited for; it may raise.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as thread:
        pending = deque(thread.submit(prepare, place) for place in places[:_PREFETCHED])
        for place in places:
            while not wait((pending[0],), _PATIENCE).done:
                waiting()
            batch = pending.popleft().result()
            if place + _PREFETCHED in places:
                pending.append(thread.submit(prepare, place + _PREFETCHED))
            yield batch


def evaluation_batches(
    stream: np.ndarray,
    *,
    context: int,
    batch: int,
    max_tokens: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels ``[batch, context]`` over a split in order, every token predicted once.

    So that every context sees the same tokens, the last window is filled up instead of dropped;
    the labels of what fills it, and of windows that fill the last batch, are `IGNORED`. Processes
    take batches in turn, each as many as the others.
    """
    predicted = len(stream) - 1
    if max_tokens:
        predicted = min(predicted, max_tokens)
    windows = math.ceil(predicted / context)
    for turn in range(0, windows, batch * world_size):
        first = turn + rank * batch
        inputs = torch.zeros((batch, context), dtype=torch.int64)
        labels = torch.full((batch, context), IGNORED, dtype=torch.int64)
        for row, window in enumerate(range(first, min(first + batch, windows))):
            start = window * context
            length = min(context, predicted - start)
            piece = torch.from_numpy(stream[start : start + length + 1].astype(np.int64))
            inputs[row, :length], labels[row, :length] = piece[:-1], piece[1:]
        yield inputs, labels
