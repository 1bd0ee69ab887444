"""Micro-batches on the device, each with what the teacher says of it, one ahead of the student."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.loss.chunked import Mix
from trainer.loss.sparse import SparseTargets
from trainer.models.teacher import Teacher
from trainer.targets.records import Layout


class Batch(NamedTuple):
    """A micro-batch on the device."""

    inputs: Tensor
    """``[B, L]`` token ids."""
    labels: Tensor
    """``[B, L]``, the next token ids."""
    teacher_hidden: Tensor | None = None
    """``[B, L, D_t]``; None where the teacher was not run."""
    targets: SparseTargets | None = None
    """Of its ``B · L`` tokens; None without records, or where they are not needed."""


class Feed:
    """Copies micro-batches to the device, and runs the teacher over them or reads its records.

    On a GPU both happen on a stream of their own, which needs no weight of the student and so does
    not wait for the update before: the teacher's products run beside the gradient norm, the
    optimizer and the exchange of gradients, which leave the GPU's arithmetic units idle.

    Args:
        teacher: None where no update has alpha above 0. A sharded one stays on the student's
            stream, for one process group gathers its weights and exchanges the gradients.
        device: where the batches go.
        layout: of the records that come in place of a teacher.
    """

    def __init__(
        self, teacher: Teacher | None, device: torch.device, layout: Layout | None = None
    ) -> None:
        self.teacher = teacher
        self.layout = layout
        self.device = device
        beside = device.type == "cuda" and not (teacher is not None and teacher.sharded)
        self._stream = _stream(device) if beside else None
        self._in_use: Batch | None = None

    def place(
        self, inputs: Tensor, labels: Tensor, mix: Mix, records: Tensor | None = None
    ) -> Batch:
        """The batch, ready for the next work of the current stream.

        It must not be used any more once the next call's batch has been used.

        Args:
            inputs: ``[B, L]`` token ids. The teacher runs ahead where they are in pinned memory;
                it waits for the current stream where they are on the device already.
            labels: the next token ids, in the same kind of memory.
            mix: of the update; with an alpha of 0 the teacher has no say.
            records: ``[B, L, record_bytes]`` in uint8, likewise; needed where there is a layout.
        """
        if self._stream is None:
            return self._placed(inputs, labels, mix, records)
        current = torch.cuda.current_stream(self.device)
        if inputs.is_cuda or labels.is_cuda:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            batch = self._placed(inputs, labels, mix, records)
        # The allocator returns a tensor's memory to the stream that allocated it. The batch before
        # is freed only now, after this stream was made to wait for its last use
        self._stream.wait_stream(current)
        self._in_use = batch
        current.wait_stream(self._stream)
        return batch

    def release(self) -> None:
        """Free the last batch, which must not be used any more."""
        self._in_use = None

    def _placed(self, inputs: Tensor, labels: Tensor, mix: Mix, records: Tensor | None) -> Batch:
        inputs = inputs.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if mix.alpha == 0.0:
            return Batch(inputs, labels)
        if self.layout is not None and records is not None:
            rows = records.to(self.device, non_blocking=True).flatten(0, 1)
            return Batch(inputs, labels, targets=self.layout.decode(rows, mix.temperature))
        if self.teacher is None:
            return Batch(inputs, labels)
        return Batch(inputs, labels, self.teacher.hidden(inputs))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all feeds of a process: cuBLAS keeps a workspace for each stream."""
    return torch.cuda.Stream(device)
