"""The distillation loss on a GPU: cuBLAS products and one Triton kernel per chunk of tokens.

Computes what `trainer.distill.distill_loss` computes. There, every step of the softmaxes and of
the divergence reads and writes a tensor of tokens × vocabulary; here a chunk's logits leave the
two products in the type of their operands, and one program per token does all the rest:

1. one pass over both rows keeps running maxima and sums (Milakov & Gimelshein, 2018,
   arXiv:1805.02867) of the student at temperature 1 and at T and of the teacher at T, together
   with the divergence's own sum;
2. a second pass, which finds the rows in the L2 cache, writes the gradient of the mixed loss over
   the student's logits.

Two more products turn that gradient into those of hidden state and head, the latter accumulated
in fp32 over the chunks. Nothing is read back to the host, and alpha and T are plain arguments of
the kernel, so schedules do not recompile it.

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

from trainer.distill import KD_SCHEMES, DistillLoss, Mix, _check_shapes

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
    wide_logits: bool = False,
) -> DistillLoss:
    """Loss over ``N`` predicted tokens; see `trainer.distill.distill_loss` for the definition.

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
        wide_logits: keep logits in fp32 instead of the type of the operands.

    Products are computed in the dtype of the hidden states, and the logits are rounded to it; all
    else is fp32. Heads of another dtype are cast once.

    Raises:
        ValueError: shapes that do not agree, or no teacher although ``alpha`` > 0.
    """
    _check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, labels, mix)
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
        wide_logits,
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
        wide_logits: bool,
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
                wide_logits,
                needs=(ctx.needs_input_grad[0], ctx.needs_input_grad[1]),
            )
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.tokens, ctx.head_dtype = tokens, student_head.dtype
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
        grad_hidden, grad_head = ctx.saved_tensors
        # The mean's 1 / N comes last, so that fp16 gradients keep the scale of the loss scaler
        scale = grads[0] / ctx.tokens
        return (
            None if grad_hidden is None else grad_hidden * scale,
            None if grad_head is None else (grad_head * scale).to(ctx.head_dtype),
            *(None,) * 7,
        )


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class _Head:
    """Hidden states and the head that belongs to them, its vocabulary padded."""

    hidden: Tensor
    """``[N, D]``."""
    weight: Tensor
    """``[V_p, D]`` in the dtype of ``hidden``; rows from ``V`` on are 0."""
    bias: Tensor | None
    """``[V_p]`` in fp32."""

    @classmethod
    def padded(cls, hidden: Tensor, head: Tensor, bias: Tensor | None, vocabulary: int) -> _Head:
        rows = -(-vocabulary // _ALIGNMENT) * _ALIGNMENT
        if head.shape[0] == vocabulary == rows and head.dtype == hidden.dtype:
            weight = head
        else:
            weight = torch.empty((rows, head.shape[1]), dtype=hidden.dtype, device=hidden.device)
            weight[:vocabulary].copy_(head[:vocabulary])
            weight[vocabulary:].zero_()
        wide_bias = None
        if bias is not None:
            wide_bias = torch.zeros(rows, dtype=torch.float32, device=hidden.device)
            wide_bias[:vocabulary].copy_(bias[:vocabulary])
        return cls(hidden, weight, wide_bias)

    def logits(self, part: slice, out: Tensor) -> None:
        """Logits of some tokens, without the bias, into ``out`` ``[n, V_p]``."""
        _product(out, self.hidden[part], self.weight.T)


def _chunk_tokens(student: _Head, teacher: _Head | None) -> int:
    tokens, row = student.hidden.shape[0], student.weight.shape[0]
    row_bytes = row * student.hidden.element_size()
    if teacher is not None:
        row_bytes += row * teacher.hidden.element_size()
    chunks = -(-tokens * row_bytes // WORKSPACE_BYTES)
    return -(-tokens // chunks)


def _over_chunks(
    student: _Head,
    teacher: _Head | None,
    labels: Tensor,
    mix: Mix,
    vocabulary: int,
    chunk_tokens: int,
    wide_logits: bool,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Per-token CE and divergence, and the gradients of the *sum* of the mixed loss.

    Returns:
        CE and divergence ``[N]`` in fp32 (NaN where not computed), and the gradients of hidden
        state ``[N, D]`` and head ``[V, D]`` (fp32), each None where not needed.
    """
    from trainer import fused_loss_kernel

    hidden, weight = student.hidden, student.weight
    tokens, padded = hidden.shape[0], weight.shape[0]
    size = min(chunk_tokens, tokens)
    kind = torch.float32 if wide_logits else hidden.dtype
    logits = torch.empty((size, padded), dtype=kind, device=hidden.device)
    targets = None
    if teacher is not None:
        kind = torch.float32 if wide_logits else teacher.hidden.dtype
        targets = torch.empty((size, padded), dtype=kind, device=hidden.device)
    gradient = logits if not wide_logits else torch.empty_like(logits, dtype=hidden.dtype)
    per_token = torch.full((2, tokens), math.nan, dtype=torch.float32, device=hidden.device)
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_head = None
    if needs[1]:
        grad_head = torch.empty(weight.shape, dtype=torch.float32, device=hidden.device)
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        rows = part.stop - part.start
        student.logits(part, logits[:rows])
        if teacher is not None and targets is not None:
            teacher.logits(part, targets[:rows])
        fused_loss_kernel.launch(
            logits[:rows],
            gradient[:rows],
            targets,
            None if teacher is None else teacher.bias,
            labels[part],
            per_token[:, part],
            mix,
            vocabulary,
        )
        if grad_hidden is not None:
            torch.mm(gradient[:rows], weight, out=grad_hidden[part])
        if grad_head is not None:
            _product(grad_head, gradient[:rows].T, hidden[part], add=start > 0)
    return (
        per_token[0],
        per_token[1],
        grad_hidden,
        None if grad_head is None else grad_head[:vocabulary],
    )


def _product(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """``out = left @ right``, added to what ``out`` holds if ``add``."""
    beta = 1 if add else 0
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif out.device.type == "cuda":
        # Narrow operands, fp32 result: rounding every chunk to bf16 would cost accuracy
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)
