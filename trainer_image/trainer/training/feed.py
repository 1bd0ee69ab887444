"""Micro-batches on the device, each with the teacher's hidden state, one ahead of the student."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.models.teacher import Teacher


class Batch(NamedTuple):
    """A micro-batch on the device."""

    inputs: Tensor
    """``[B, T]`` token ids."""
    labels: Tensor
    """``[B, T]``, the next token ids."""
    teacher_hidden: Tensor | None
    """``[B, T, D_t]``; None where it was not asked for."""


class Feed:
    """Copies micro-batches to the device and runs the teacher over them.

    On a GPU both happen on a stream of their own, which depends on no weight of the student and so
    does not wait for the update before: the teacher's products run beside the norms, the optimizer
    and the exchange of gradients, which leave the GPU's arithmetic idle.

    Args:
        teacher: None where no update has alpha above 0. A sharded one stays on the student's
            stream, for its weights travel with the student's gradients.
        device: where the batches go.
    """

    def __init__(self, teacher: Teacher | None, device: torch.device) -> None:
        self.teacher = teacher
        self.device = device
        beside = device.type == "cuda" and not (teacher is not None and teacher.sharded)
        self._stream = _stream(device) if beside else None
        self._in_use: Batch | None = None

    def place(self, inputs: Tensor, labels: Tensor, *, teach: bool) -> Batch:
        """The batch, ready for what the current stream does next.

        It may be used until the next call's batch has been, not longer.

        Args:
            inputs: ``[B, T]`` token ids, in pinned memory for the teacher to run ahead; what is
                on the device already is waited for.
            labels: the same, the next token ids.
            teach: run the teacher, if there is one.
        """
        if self._stream is None:
            return self._placed(inputs, labels, teach)
        current = torch.cuda.current_stream(self.device)
        if inputs.is_cuda or labels.is_cuda:
            self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            batch = self._placed(inputs, labels, teach)
        # Memory goes back to the stream that it came from. The batch before is given up only now,
        # when all that the stream does next comes after its last use
        self._stream.wait_stream(current)
        self._in_use = batch
        current.wait_stream(self._stream)
        return batch

    def release(self) -> None:
        """Give up the last batch, whose use must be over."""
        self._in_use = None

    def _placed(self, inputs: Tensor, labels: Tensor, teach: bool) -> Batch:
        inputs = inputs.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        if not teach or self.teacher is None:
            return Batch(inputs, labels, None)
        return Batch(inputs, labels, self.teacher.hidden(inputs))


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all feeds of a process: cuBLAS keeps a workspace for every stream it has seen."""
    return torch.cuda.Stream(device)
