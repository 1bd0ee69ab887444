"""The distillation loss on a GPU: cuBLAS products and one Triton kernel per chunk of tokens.

Computes what `trainer.loss.chunked.distill_loss` computes. There, every step of the softmaxes and
of the divergence reads and writes a tensor of tokens × vocabulary; here a chunk's logits leave the
two products in the type of their operands, and one program per token does the rest:

1. a pass over the token's two rows of logits keeps running maxima and sums (Milakov & Gimelshein,
   2018, arXiv:1805.02867) of the student at temperature 1 and at T and of the teacher at T,
   together with the sum of the divergence;
2. a second pass, which finds the rows in the L2 cache, overwrites the student's logits by the
   gradient of the mixed loss.

Two more products turn that gradient into those of hidden state and head, the latter accumulated
in fp32 over the chunks. Nothing is read back to the host, and alpha and T are plain arguments of
the kernel, so schedules do not recompile it.

Operands in bf16 are multiplied as fp16, which is as fast and as small, but gives logits and their
gradient 11 significant bits instead of 8: GPT-2's logits lie near -60, where the step of bf16 is a
quarter of a nat and that of fp16 a thirty-second. fp16's smaller range is no loss: numbers beyond
65,504 do not occur in a normalized hidden state or a head, and those below 6e-8 do not matter.

The vocabulary is padded inside to a multiple of 64: rows that do not start at a multiple of 16
bytes (50,257 is odd) keep the products and the kernel from wide memory accesses.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainer.loss.chunked import (
    DistillLoss,
    Mix,
    Sums,
    check_shapes,
    gradient_scale,
    loss_of_sums,
    product,
)
from trainer.loss.divergences import DIVERGENCES
from trainer.loss.sparse import SparseTargets, check_sparse

WORKSPACE_BYTES = 600 << 20
"""Upper bound on the logits of one chunk, student's and teacher's together."""

_ALIGNMENT = 64
"""The padded vocabulary is a multiple of this."""

_OPERANDS = (torch.bfloat16, torch.float16, torch.float32)


def usable(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    mix: Mix,
) -> bool:
    """Whether `distill_loss` of this module can take these operands.

    That needs Triton and an NVIDIA GPU of compute capability 8.0 or above that holds them all, and
    a divergence and types that the kernel has. A teacher that alpha = 0 leaves unused does not
    matter.
    """
    operands = [student_hidden, student_head]
    if mix.alpha > 0.0:
        operands += [part for part in (teacher_hidden, teacher_head) if part is not None]
    device = student_hidden.device
    return (
        student_hidden.shape[0] > 0
        and in_kernel(mix, (part.dtype for part in operands))
        and device.type == "cuda"
        and torch.version.hip is None
        and all(part.device == device for part in operands)
        and _has_triton()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def in_kernel(mix: Mix, dtypes: Iterable[torch.dtype]) -> bool:
    """Whether the kernel has the divergence of ``mix`` and operands of these types: on any device.

    At alpha = 0 the kernel computes cross entropy alone, whichever divergence is named.
    """
    divergence = DIVERGENCES.get(mix.scheme)
    return (
        divergence is not None
        and (mix.alpha == 0.0 or divergence.kernel_branch is not None)
        and all(dtype in _OPERANDS for dtype in dtypes)
    )


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    mix: Mix,
    *,
    teacher_bias: Tensor | None = None,
    chunk_tokens: int | None = None,
) -> DistillLoss:
    """Loss over ``N`` predicted tokens; arguments as of `trainer.loss.chunked.distill_loss`.

    ``chunk_tokens`` is the number of tokens of a chunk; by default as many as `WORKSPACE_BYTES`
    hold, in chunks of equal size.

    Products take fp32 operands where the hidden state is fp32, else fp16, and accumulate in fp32;
    logits are kept in the type of the operands, and all else is fp32.

    Raises:
        ValueError: shapes that do not agree, no teacher although ``alpha`` > 0, or a divergence
            that is unknown or not in the kernel.
    """
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, labels, mix)
    if not in_kernel(mix, ()):
        raise ValueError(f"the fused loss has no kernel for divergence {mix.scheme!r}")

    def compute(needs: tuple[bool, ...]) -> Sums:
        vocabulary = student_head.shape[0]
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = _Head.padded(student_hidden, student_head, None, vocabulary)
            teacher = None
            if mix.alpha > 0.0 and teacher_hidden is not None and teacher_head is not None:
                teacher = _Head.padded(teacher_hidden, teacher_head, teacher_bias, vocabulary)
            size = chunk_tokens or _chunk_tokens(student, teacher)
            launch = _dense(teacher, min(size, len(student_hidden)), vocabulary)
            return _over_chunks(student, launch, labels.contiguous(), mix, vocabulary, size, needs)

    return loss_of_sums(student_hidden, student_head, mix, compute)


def sparse_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    targets: SparseTargets | None,
    labels: Tensor,
    mix: Mix,
    *,
    chunk_tokens: int | None = None,
) -> DistillLoss:
    """Loss over ``N`` predicted tokens; arguments as of `trainer.loss.sparse.sparse_distill_loss`.

    Types and ``chunk_tokens`` as of `distill_loss`.

    Raises:
        ValueError: shapes that do not agree, no targets although ``alpha`` > 0, or another
            divergence than forward KL.
    """
    check_sparse(student_hidden, student_head, targets, labels, mix)

    def compute(needs: tuple[bool, ...]) -> Sums:
        vocabulary = student_head.shape[0]
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = _Head.padded(student_hidden, student_head, None, vocabulary)
            size = chunk_tokens or _chunk_tokens(student, None)
            launch = _dense(None, 0, vocabulary)
            if mix.alpha > 0.0 and targets is not None:
                launch = _sparse(targets, vocabulary)
            return _over_chunks(student, launch, labels.contiguous(), mix, vocabulary, size, needs)

    return loss_of_sums(student_hidden, student_head, mix, compute)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class _Head:
    """Hidden states and their head, padded and cast for the products."""

    hidden: Tensor
    """``[N, D]``, as given."""
    weight: Tensor
    """``[V_p, D]`` in the type that is multiplied; rows from ``V`` on are 0."""
    bias: Tensor | None
    """``[V_p]`` in fp32."""

    @classmethod
    def padded(cls, hidden: Tensor, head: Tensor, bias: Tensor | None, vocabulary: int) -> _Head:
        rows = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
        kind = torch.float32 if hidden.dtype == torch.float32 else torch.float16
        weight = torch.empty((rows, head.shape[1]), dtype=kind, device=hidden.device)
        weight[:vocabulary].copy_(head[:vocabulary])
        weight[vocabulary:].zero_()
        wide_bias = None
        if bias is not None:
            wide_bias = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
            wide_bias[:vocabulary].copy_(bias[:vocabulary])
        return cls(hidden, weight, wide_bias)

    def chunk(self, tokens: slice) -> Tensor:
        """Hidden states of ``tokens`` in the type that is multiplied."""
        return self.hidden[tokens].to(self.weight.dtype)

    def buffer(self, tokens: int) -> Tensor:
        """Uninitialized logits ``[tokens, V_p]``."""
        return self.weight.new_empty((tokens, self.weight.shape[0]))


def _chunk_tokens(student: _Head, teacher: _Head | None) -> int:
    heads = [student] if teacher is None else [student, teacher]
    row_bytes = sum(head.weight.shape[0] * head.weight.element_size() for head in heads)
    tokens = student.hidden.shape[0]
    chunks = -(-tokens * row_bytes // WORKSPACE_BYTES)
    return -(-tokens // chunks)


class _Launch(Protocol):
    """Loss and gradient of one chunk; see `trainer.loss.kernel.launch`."""

    def __call__(
        self,
        part: slice,
        logits: Tensor,
        labels: Tensor,
        per_token: Tensor,
        mix: Mix,
        scale: float,
    ) -> None: ...


def _dense(teacher: _Head | None, size: int, vocabulary: int) -> _Launch:
    """With the teacher's logits, of chunks of up to ``size`` tokens; None at alpha 0."""
    from trainer.loss import kernel

    buffer = None if teacher is None else teacher.buffer(size)

    def launch(
        part: slice, logits: Tensor, labels: Tensor, per_token: Tensor, mix: Mix, scale: float
    ) -> None:
        if teacher is not None and buffer is not None:
            product(buffer[: len(logits)], teacher.chunk(part), teacher.weight.T)
        bias = None if teacher is None else teacher.bias
        kernel.launch(
            logits, buffer, bias, labels, per_token, mix, vocabulary, gradient_scale=scale
        )

    return launch


def _sparse(targets: SparseTargets, vocabulary: int) -> _Launch:
    """With the entries of stored targets."""
    from trainer.loss import sparse_kernel

    def launch(
        part: slice, logits: Tensor, labels: Tensor, per_token: Tensor, mix: Mix, scale: float
    ) -> None:
        of_part = SparseTargets(*(field[part].contiguous() for field in targets))
        sparse_kernel.launch(
            logits, of_part, labels, per_token, mix, vocabulary, gradient_scale=scale
        )

    return launch


def _over_chunks(
    student: _Head,
    launch: _Launch,
    labels: Tensor,
    mix: Mix,
    vocabulary: int,
    chunk_tokens: int,
    needs: tuple[bool, ...],
) -> Sums:
    tokens, width = student.hidden.shape
    scale = gradient_scale(student.weight.dtype, mix)
    size = min(chunk_tokens, tokens)
    student_rows = student.buffer(size)
    per_token = torch.full((2, tokens), math.nan, dtype=torch.float32, device=labels.device)
    grad_hidden = student_rows.new_empty((tokens, width), dtype=torch.float32) if needs[0] else None
    grad_head = torch.empty_like(student.weight, dtype=torch.float32) if needs[1] else None
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        hidden, logits = student.chunk(part), student_rows[: part.stop - start]
        product(logits, hidden, student.weight.T)
        launch(part, logits, labels[part], per_token[:, part], mix, scale)
        gradient = logits  # the kernel has overwritten them
        if grad_hidden is not None:
            product(grad_hidden[part], gradient, student.weight)
        if grad_head is not None:
            product(grad_head, gradient.T, hidden, add=start > 0)
    grad_head = None if grad_head is None else grad_head[:vocabulary]
    return Sums(per_token[0].sum(), per_token[1].sum(), grad_hidden, grad_head, scale)
