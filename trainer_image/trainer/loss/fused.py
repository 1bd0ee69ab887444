"""The distillation loss on a GPU: cuBLAS products and one Triton kernel per chunk of tokens.

Computes what `trainer.loss.chunked.distill_loss` computes. There, every step of the softmaxes and
of the divergence reads and writes a tensor of tokens × vocabulary; here a chunk's logits leave the
two products in the type of their operands, and one program per token does all the rest:

1. one pass over both rows keeps running maxima and sums (Milakov & Gimelshein, 2018,
   arXiv:1805.02867) of the student at temperature 1 and at T and of the teacher at T, together
   with the divergence's own sum;
2. a second pass, which finds the rows in the L2 cache, writes the gradient of the mixed loss over
   the student's logits.

Two more products turn that gradient into those of hidden state and head, the latter accumulated
in fp32 over the chunks. Nothing is read back to the host, and alpha and T are plain arguments of
the kernel, so schedules do not recompile it.

Operands in bf16 are multiplied as fp16, which is as fast and as small. What bf16 can hold and fp16
cannot, beyond 65,504 or below 6e-8, does not occur in a normalized hidden state or matters in a
head; but logits and their gradient keep 11 significant bits instead of 8. GPT-2's logits lie near
-60, where the step of bf16 is a quarter of a nat and that of fp16 a thirty-second.

The vocabulary is padded inside to a multiple of 64, because rows that do not start at a multiple
of 16 bytes (50,257 is odd) cost both the products and the kernel their wide memory accesses.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.loss.chunked import (
    KD_SCHEMES,
    DistillLoss,
    Mix,
    check_shapes,
    gradient_scale,
    product,
    scaled_gradients,
)

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

    That needs Triton and an NVIDIA GPU of compute capability 8.0 or above that holds them all, in
    bf16, fp16 or fp32. A teacher that alpha = 0 leaves unused does not matter.
    """
    operands = [student_hidden, student_head]
    if mix.alpha > 0.0:
        operands += [part for part in (teacher_hidden, teacher_head) if part is not None]
    device = student_hidden.device
    if any(part.device != device or part.dtype not in _OPERANDS for part in operands):
        return False
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if mix.scheme not in KD_SCHEMES or student_hidden.shape[0] == 0:
        return False
    return _has_triton() and torch.cuda.get_device_capability(device) >= (8, 0)


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
    """Loss over ``N`` predicted tokens; see `trainer.loss.chunked.distill_loss` for the definition.

    Args:
        student_hidden: ``[N, D_s]``, the student's last hidden state; receives a gradient.
        student_head: ``[V, D_s]``, the student's output embedding; receives a gradient.
        teacher_hidden: ``[N, D_t]``, or None when ``alpha`` is 0.
        teacher_head: ``[V_t, D_t]`` with ``V_t ≥ V``; rows past ``V`` are padding and are left
            out of the teacher's distribution. None when ``alpha`` is 0.
        labels: ``[N]`` token ids.
        mix: alpha, temperature and divergence.
        teacher_bias: ``[V_t]``, the bias of the teacher's head where it has one.
        chunk_tokens: tokens taken at a time; by default as many as `WORKSPACE_BYTES` hold, in
            chunks of equal size.

    Products take fp32 operands where the hidden state is fp32, else fp16, and accumulate in fp32;
    logits are kept in the type of the operands, and all else is fp32.

    Raises:
        ValueError: shapes that do not agree, or no teacher although ``alpha`` > 0.
    """
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, labels, mix)
    if mix.alpha == 0.0:
        teacher_hidden = teacher_head = teacher_bias = None
    loss, ce, kd = _FusedLoss.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        teacher_bias,
        labels,
        mix,
        chunk_tokens,
    )
    return DistillLoss(loss, ce, kd)


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients chunk by chunk; backward only scales what forward has computed."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor | None,
        teacher_head: Tensor | None,
        teacher_bias: Tensor | None,
        labels: Tensor,
        mix: Mix,
        chunk_tokens: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = student_hidden.shape[0], student_head.shape[0]
        with torch.autocast(student_hidden.device.type, enabled=False):
            student = _Head.padded(student_hidden, student_head, None, vocabulary)
            teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher = _Head.padded(teacher_hidden, teacher_head, teacher_bias, vocabulary)
            ce, kd, grad_hidden, grad_head = _over_chunks(
                student,
                teacher,
                labels.contiguous(),
                mix,
                vocabulary,
                chunk_tokens or _chunk_tokens(student, teacher),
                needs=(ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
            )
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.divisor = tokens * gradient_scale(student.weight.dtype, mix)
        ctx.dtypes = student_hidden.dtype, student_head.dtype
        ce_mean, kd_mean = ce.sum() / tokens, kd.sum() / tokens
        loss = torch.zeros_like(ce_mean)
        if mix.alpha < 1.0:
            loss = loss + (1.0 - mix.alpha) * ce_mean
        if mix.alpha > 0.0:
            loss = loss + mix.alpha * mix.temperature**2 * kd_mean
        ctx.mark_non_differentiable(ce_mean, kd_mean)
        return loss, ce_mean, kd_mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scaled_gradients(ctx, grads[0])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class _Head:
    """Hidden states and the head that belongs to them, made ready for the products."""

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
        """Hidden states of some tokens in the type that is multiplied."""
        return self.hidden[tokens].to(self.weight.dtype)

    def buffer(self, tokens: int) -> Tensor:
        """Room for the logits of so many tokens."""
        return self.weight.new_empty((tokens, self.weight.shape[0]))


def _chunk_tokens(student: _Head, teacher: _Head | None) -> int:
    heads = [student] if teacher is None else [student, teacher]
    row_bytes = sum(head.weight.shape[0] * head.weight.element_size() for head in heads)
    tokens = student.hidden.shape[0]
    chunks = -(-tokens * row_bytes // WORKSPACE_BYTES)
    return -(-tokens // chunks)


def _over_chunks(
    student: _Head,
    teacher: _Head | None,
    labels: Tensor,
    mix: Mix,
    vocabulary: int,
    chunk_tokens: int,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Per-token CE and divergence, and the gradients of the *sum* of the mixed loss.

    Returns:
        CE and divergence ``[N]`` (NaN where not computed), and the gradients of hidden state
        ``[N, D]`` and head ``[V, D]`` times `gradient_scale`, each None where not needed; all
        in fp32.
    """
    from trainer.loss import kernel as fused_loss_kernel

    tokens, width = student.hidden.shape
    size = min(chunk_tokens, tokens)
    logits = student.buffer(size)
    targets = None if teacher is None else teacher.buffer(size)
    per_token = torch.full((2, tokens), math.nan, dtype=torch.float32, device=labels.device)
    grad_hidden = logits.new_empty((tokens, width), dtype=torch.float32) if needs[0] else None
    grad_head = torch.empty_like(student.weight, dtype=torch.float32) if needs[1] else None
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        hidden, gradient = student.chunk(part), logits[: part.stop - start]
        product(gradient, hidden, student.weight.T)
        if teacher is not None and targets is not None:
            product(targets[: part.stop - start], teacher.chunk(part), teacher.weight.T)
        fused_loss_kernel.launch(
            gradient,
            targets,
            None if teacher is None else teacher.bias,
            labels[part],
            per_token[:, part],
            mix,
            vocabulary,
            gradient_scale=gradient_scale(student.weight.dtype, mix),
        )
        # From here on the gradient stands where the student's logits stood
        if grad_hidden is not None:
            product(grad_hidden[part], gradient, student.weight)
        if grad_head is not None:
            product(grad_head, gradient.T, hidden, add=start > 0)
    head_part = None if grad_head is None else grad_head[:vocabulary]
    return per_token[0], per_token[1], grad_hidden, head_part
