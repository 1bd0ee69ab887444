"""The distillation loss, from hidden states and output heads, without the full logits.

``alpha · T² · D(teacher_T, student_T) + (1 − alpha) · CE``, the mean over predicted tokens in
nats, with the cross entropy at temperature 1 (Hinton et al., 2015, arXiv:1503.02531). The
divergence D is one of

- ``forward_kl``: KL(teacher ‖ student);
- ``reverse_kl``: KL(student ‖ teacher) (Gu et al., 2023, arXiv:2306.08543);
- ``jsd``: the Jensen-Shannon divergence, ½ KL(teacher ‖ m) + ½ KL(student ‖ m) with
  m = ½ (teacher + student) (Agarwal et al., 2023, arXiv:2306.13649, at beta ½).

A vocabulary of 50,257 makes logits by far the largest tensor of the step. Tokens are therefore
taken in chunks: each chunk's logits are computed, reduced to the loss *and* to the gradient with
respect to them, multiplied back into the gradients of hidden state and head, and dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KD_SCHEMES = ("forward_kl", "reverse_kl", "jsd")

CHUNK_ELEMENTS = 1 << 25
"""Upper bound on tokens × vocabulary of one chunk (128 MiB in fp32)."""


class DistillLoss(NamedTuple):
    """Three scalars in fp32; only ``loss`` carries a gradient."""

    loss: Tensor
    """``alpha · T² · kd + (1 − alpha) · ce``, in nats."""
    ce: Tensor
    """Mean cross entropy at temperature 1, in nats; NaN where it was not computed."""
    kd: Tensor
    """Mean divergence at temperature T, *without* T², in nats; NaN where not computed."""


@dataclass(frozen=True)
class Mix:
    """How the two terms are weighed in one step."""

    alpha: float
    temperature: float
    scheme: str = "forward_kl"


def distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    mix: Mix,
    *,
    teacher_bias: Tensor | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> DistillLoss:
    """Loss over ``N`` predicted tokens.

    Args:
        student_hidden: ``[N, D_s]``, the student's last hidden state; receives a gradient.
        student_head: ``[V, D_s]``, the student's output embedding; receives a gradient.
        teacher_hidden: ``[N, D_t]``, or None when ``alpha`` is 0.
        teacher_head: ``[V_t, D_t]`` with ``V_t ≥ V``; rows past ``V`` are padding and are left
            out of the teacher's distribution. None when ``alpha`` is 0.
        labels: ``[N]`` token ids.
        mix: alpha, temperature and divergence.
        teacher_bias: ``[V_t]``, the bias of the teacher's head where it has one.
        chunk_elements: bound on tokens × vocabulary per chunk.

    Products are computed in the dtype of the hidden states (bf16 on a GPU; a head of another dtype
    is cast once), everything after them in fp32 or better. The gradients, each in the dtype of
    what it belongs to, are computed in the forward pass, so memory does not grow with ``N``.

    Raises:
        ValueError: shapes that do not agree, or no teacher although ``alpha`` > 0.
    """
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, labels, mix)
    if mix.alpha == 0.0:
        teacher_hidden = teacher_head = teacher_bias = None
    elif teacher_head is not None:
        vocabulary = student_head.shape[0]
        teacher_head = teacher_head[:vocabulary]
        teacher_bias = None if teacher_bias is None else teacher_bias[:vocabulary]
    loss, ce, kd = _ChunkedLoss.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        teacher_bias,
        labels,
        mix,
        chunk_elements,
    )
    return DistillLoss(loss, ce, kd)


def check_shapes(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    mix: Mix,
) -> None:
    """Refuse operands that do not fit together.

    Raises:
        ValueError: shapes that do not agree, no teacher although alpha > 0, or no such divergence.
    """
    if mix.scheme not in KD_SCHEMES:
        raise ValueError(f"unknown divergence {mix.scheme!r}; known: {', '.join(KD_SCHEMES)}")
    if student_hidden.ndim != 2 or student_hidden.shape[1] != student_head.shape[1]:
        raise ValueError(
            f"student hidden {tuple(student_hidden.shape)} and head {tuple(student_head.shape)}"
            " do not agree"
        )
    if labels.shape != student_hidden.shape[:1]:
        raise ValueError(f"{list(labels.shape)} labels for {student_hidden.shape[0]} tokens")
    if mix.alpha == 0.0:
        return
    if teacher_hidden is None or teacher_head is None:
        raise ValueError(f"alpha is {mix.alpha:g}, so the teacher's hidden state is needed")
    if teacher_hidden.shape != (student_hidden.shape[0], teacher_head.shape[1]):
        raise ValueError(
            f"teacher hidden {tuple(teacher_hidden.shape)} and head {tuple(teacher_head.shape)}"
            f" do not agree over {student_hidden.shape[0]} tokens"
        )
    if teacher_head.shape[0] < student_head.shape[0]:
        raise ValueError(
            f"the teacher's vocabulary of {teacher_head.shape[0]} is smaller than the student's"
            f" of {student_head.shape[0]}"
        )


def loss_and_logit_grad(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, mix: Mix
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Sums over one chunk, and the gradient of the mixed loss's *sum* by the student's logits.

    Args:
        student_logits: ``[n, V]`` in fp32 (or fp64).
        teacher_logits: the same shape, or None when alpha is 0.
        labels: ``[n]``.
        mix: alpha, temperature and divergence.

    Returns:
        The sum of cross entropies (None when alpha is 1), the sum of divergences (None when
        alpha is 0), and the gradient ``[n, V]``.
    """
    alpha, temperature = mix.alpha, mix.temperature
    ce_sum = kd_sum = None
    grad = torch.zeros_like(student_logits)
    if alpha < 1.0:
        log_probs = F.log_softmax(student_logits, dim=-1)
        ce_sum = -log_probs.gather(1, labels[:, None]).sum()
        grad = log_probs.exp_().mul_(1.0 - alpha)
        grad[torch.arange(len(labels), device=labels.device), labels] -= 1.0 - alpha
    if alpha > 0.0:
        assert teacher_logits is not None
        log_q = F.log_softmax(student_logits / temperature, dim=-1)
        log_p = F.log_softmax(teacher_logits / temperature, dim=-1)
        kd_sum, kd_grad = _divergence(log_p, log_q, mix.scheme)
        # d(T² D)/dz = T² · (dD/d(z/T)) / T
        grad.add_(kd_grad, alpha=alpha * temperature)
    return ce_sum, kd_sum, grad


def _divergence(log_p: Tensor, log_q: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Sum of D(p, q) over tokens, and its gradient by the logits of q."""
    q = log_q.exp()
    if scheme == "forward_kl":
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(), q - p
    if scheme == "reverse_kl":
        ratio = log_q - log_p
        per_token = (q * ratio).sum(-1, keepdim=True)
        return per_token.sum(), q * (ratio - per_token)
    p = log_p.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    ratio = log_q - log_m
    student_part = (q * ratio).sum(-1, keepdim=True)
    total = 0.5 * (p * (log_p - log_m)).sum() + 0.5 * student_part.sum()
    return total, 0.5 * q * (ratio - student_part)


def gradient_scale(kind: torch.dtype, mix: Mix) -> float:
    """A power of two that keeps fp16 gradients by logits from underflowing.

    A probability of 1 / V would lie at the edge of what fp16 holds in full. By a logit, CE has a
    gradient of at most 1, the divergences one of about alpha · T; reverse KL's may be larger by a
    log ratio of probabilities, for which 2^8 are left.
    """
    if kind != torch.float16:
        return 1.0
    return 2.0 ** (8 - math.ceil(math.log2(max(1.0, mix.alpha * mix.temperature))))


def product(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """``out = left @ right``, added to what ``out`` holds if ``add``."""
    beta = 1 if add else 0
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif out.device.type == "cuda":
        # fp32 results of narrow operands: chunks add up without rounding in between
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)


def scaled_gradients(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
    """What a backward pass returns that only scales the gradients which its forward has kept.

    They are those of the sum over tokens in fp32, to be divided by ``ctx.divisor`` and rounded to
    ``ctx.dtypes`` once: fp16 gradients need the loss scaler's factor first.
    """
    scale = incoming / ctx.divisor
    gradients = (
        None if kept is None else (kept * scale).to(kind)
        for kept, kind in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return (*gradients, *(None,) * 6)


class _ChunkedLoss(torch.autograd.Function):
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
        chunk_elements: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, vocabulary = student_hidden.shape[0], student_head.shape[0]
        # Accumulate over chunks in fp32 or better, whatever the operands are
        wide = torch.promote_types(student_hidden.dtype, torch.float32)
        head = student_head.to(student_hidden.dtype)
        if teacher_hidden is not None and teacher_head is not None:
            teacher_head = teacher_head.to(teacher_hidden.dtype)
        need_hidden, need_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(student_hidden, dtype=wide) if need_hidden else None
        grad_head = torch.zeros_like(student_head, dtype=wide) if need_head else None
        ce_sum = student_hidden.new_zeros((), dtype=wide)
        kd_sum = student_hidden.new_zeros((), dtype=wide)
        for rows in torch.arange(tokens).split(max(1, chunk_elements // vocabulary)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            hidden = student_hidden[part]
            teacher_logits = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher_logits = F.linear(teacher_hidden[part], teacher_head, teacher_bias).to(wide)
            ce, kd, grad = loss_and_logit_grad(
                F.linear(hidden, head).to(wide), teacher_logits, labels[part], mix
            )
            ce_sum += 0.0 if ce is None else ce
            kd_sum += 0.0 if kd is None else kd
            grad = grad.mul_(gradient_scale(head.dtype, mix)).to(head.dtype)
            if grad_hidden is not None:
                product(grad_hidden[part], grad, head)
            if grad_head is not None:
                product(grad_head, grad.T, hidden, add=True)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.divisor = tokens * gradient_scale(head.dtype, mix)
        ctx.dtypes = student_hidden.dtype, student_head.dtype
        ce_mean = ce_sum / tokens if mix.alpha < 1.0 else torch.full_like(ce_sum, math.nan)
        kd_mean = kd_sum / tokens if mix.alpha > 0.0 else torch.full_like(kd_sum, math.nan)
        loss = (1.0 - mix.alpha) * (ce_sum / tokens)
        loss = loss + mix.alpha * mix.temperature**2 * (kd_sum / tokens)
        ctx.mark_non_differentiable(ce_mean, kd_mean)
        return loss, ce_mean, kd_mean

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return scaled_gradients(ctx, grads[0])
