"""The distillation loss, from hidden states and output heads, without the full logits.

``alpha · T² · D(teacher_T, student_T) + (1 − alpha) · CE``, the mean over predicted tokens in
nats, with the cross entropy at temperature 1 (Hinton et al., 2015, arXiv:1503.02531). The
divergence D is one of `trainer.loss.divergences`.

With a vocabulary of 50,257, logits are by far the largest tensor of the step. Tokens are therefore
taken in chunks: each chunk's logits are computed, reduced to the loss *and* to the loss's gradient
by these logits, which two products turn into gradients of hidden state and head, and dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.loss.divergences import DIVERGENCES

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
    """How one update weighs the two terms of the loss."""

    alpha: float
    temperature: float
    scheme: str = "forward_kl"
    """A name of `DIVERGENCES`."""


class Sums(NamedTuple):
    """The loss's terms summed over tokens, and the gradients of the sum of the mixed loss."""

    ce: Tensor
    """In nats; NaN where alpha is 1."""
    kd: Tensor
    """The divergence at temperature T in nats; NaN where alpha is 0."""
    grad_hidden: Tensor | None
    """``[N, D_s]`` in fp32 or better, times ``scale``; None where not needed."""
    grad_head: Tensor | None
    """``[V, D_s]``, likewise."""
    scale: float
    """See `gradient_scale`."""


class _LossOfSums(torch.autograd.Function):
    """Computes the gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, mix: Mix, compute: Callable[..., Sums]
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = compute(ctx.needs_input_grad[:2])
        tokens = hidden.shape[0]
        ctx.save_for_backward(sums.grad_hidden, sums.grad_head)
        ctx.divisor, ctx.dtypes = tokens * sums.scale, (hidden.dtype, head.dtype)
        ce, kd = sums.ce / tokens, sums.kd / tokens
        loss = torch.zeros_like(ce)
        if mix.alpha < 1.0:
            loss = loss + (1.0 - mix.alpha) * ce
        if mix.alpha > 0.0:
            loss = loss + mix.alpha * mix.temperature**2 * kd
        ctx.mark_non_differentiable(ce, kd)
        return loss, ce, kd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Rounded only now, for fp16 gradients need the loss scaler's factor, which comes in here
        scale = grads[0] / ctx.divisor
        gradients = (
            None if saved is None else (saved * scale).to(kind)
            for saved, kind in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None)


def loss_of_sums(
    student_hidden: Tensor,
    student_head: Tensor,
    mix: Mix,
    compute: Callable[[tuple[bool, ...]], Sums],
) -> DistillLoss:
    """The loss, differentiable by hidden state and head, from what ``compute`` sums up.

    ``compute`` is told whether the gradients of hidden state and of head are needed.
    """
    return DistillLoss(*_LossOfSums.apply(student_hidden, student_head, mix, compute))


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
    is cast once), everything after them in fp32 or better. The gradients, each in the dtype of its
    tensor, are computed in the forward pass, so memory does not grow with ``N``.

    Raises:
        ValueError: shapes that do not agree, no teacher although ``alpha`` > 0, or an unknown
            divergence.
    """
    check_shapes(student_hidden, student_head, teacher_hidden, teacher_head, labels, mix)

    def compute(needs: tuple[bool, ...]) -> Sums:
        divergence = None
        if mix.alpha > 0.0 and teacher_hidden is not None and teacher_head is not None:
            vocabulary, kind = student_head.shape[0], teacher_hidden.dtype
            bias = None if teacher_bias is None else teacher_bias[:vocabulary]
            head = teacher_head[:vocabulary].to(kind)

            def divergence(part: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
                logits = F.linear(teacher_hidden[part], head, bias).to(log_q.dtype)
                log_p = F.log_softmax(logits / mix.temperature, dim=-1)
                return DIVERGENCES[mix.scheme].sum_and_gradient(log_p, log_q)

        return over_chunks(
            student_hidden, student_head, divergence, labels, mix, chunk_elements, needs
        )

    return loss_of_sums(student_hidden, student_head, mix, compute)


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
        ValueError: shapes that do not agree, no teacher although alpha > 0, or an unknown
            divergence.
    """
    if mix.scheme not in DIVERGENCES:
        raise ValueError(f"unknown divergence {mix.scheme!r}; known: {', '.join(DIVERGENCES)}")
    check_student_shapes(student_hidden, student_head, labels)
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


def check_student_shapes(student_hidden: Tensor, student_head: Tensor, labels: Tensor) -> None:
    """Refuse a student's operands that do not fit together.

    Raises:
        ValueError: shapes that do not agree.
    """
    if student_hidden.ndim != 2 or student_hidden.shape[1] != student_head.shape[1]:
        raise ValueError(
            f"student hidden {tuple(student_hidden.shape)} and head {tuple(student_head.shape)}"
            " do not agree"
        )
    if labels.shape != student_hidden.shape[:1]:
        raise ValueError(f"{list(labels.shape)} labels for {student_hidden.shape[0]} tokens")


ChunkDivergence = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""From a chunk's place among the tokens and the student's log q at T, ``[n, V]``: the sum of the
divergence in nats, and its gradient ``[n, V]`` by the logits of which q is the softmax."""


def _sums_and_gradient(
    student_logits: Tensor,
    divergence: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    labels: Tensor,
    mix: Mix,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over one chunk, and the gradient of the mixed loss's *sum* by the student's logits.

    Args:
        student_logits: ``[n, V]`` in fp32 (or fp64).
        divergence: of this chunk, see `ChunkDivergence`; None when alpha is 0.
        labels: ``[n]``.
        mix: alpha, temperature and divergence.

    Returns:
        The sum of cross entropies (NaN when alpha is 1), the sum of divergences (NaN when alpha
        is 0), and the gradient ``[n, V]``.
    """
    alpha, temperature = mix.alpha, mix.temperature
    ce_sum = kd_sum = student_logits.new_full((), math.nan)
    grad = torch.zeros_like(student_logits)
    if alpha < 1.0:
        log_probs = F.log_softmax(student_logits, dim=-1)
        ce_sum = -log_probs.gather(1, labels[:, None]).sum()
        grad = log_probs.exp_().mul_(1.0 - alpha)
        grad[torch.arange(len(labels), device=labels.device), labels] -= 1.0 - alpha
    if alpha > 0.0:
        assert divergence is not None
        kd_sum, kd_grad = divergence(F.log_softmax(student_logits / temperature, dim=-1))
        # d(T² D)/dz = T² · (dD/d(z/T)) / T
        grad.add_(kd_grad, alpha=alpha * temperature)
    return ce_sum, kd_sum, grad


def gradient_scale(kind: torch.dtype, mix: Mix) -> float:
    """The power of two by which gradients by logits are multiplied, so that fp16 holds them.

    A probability of 1 / V lies at the edge of fp16's normal numbers. The gradient of CE by a logit
    is at most 1, that of a divergence about alpha · T; reverse KL's may be larger by a log ratio
    of probabilities, for which a factor of 2^8 is left below fp16's largest number.
    """
    if kind != torch.float16:
        return 1.0
    return 2.0 ** (8 - math.ceil(math.log2(max(1.0, mix.alpha * mix.temperature))))


def product(out: Tensor, left: Tensor, right: Tensor, *, add: bool = False) -> None:
    """``out = left @ right``, or ``out += left @ right`` with ``add``."""
    beta = 1 if add else 0
    if left.dtype == out.dtype:
        torch.addmm(out, left, right, beta=beta, out=out)
    elif out.device.type == "cuda":
        # An fp32 result of narrow operands: nothing is rounded between the sums of two chunks
        torch.addmm(out, left, right, beta=beta, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, left.to(out.dtype), right.to(out.dtype), beta=beta, out=out)


def over_chunks(
    student_hidden: Tensor,
    student_head: Tensor,
    divergence: ChunkDivergence | None,
    labels: Tensor,
    mix: Mix,
    chunk_elements: int,
    needs: tuple[bool, ...],
) -> Sums:
    """The sums of a loss whose divergence is computed chunk by chunk; None at alpha 0."""
    tokens, vocabulary = student_hidden.shape[0], student_head.shape[0]
    # Accumulate over chunks in fp32 or better, whatever the operands are
    wide = torch.promote_types(student_hidden.dtype, torch.float32)
    head = student_head.to(student_hidden.dtype)
    scale = gradient_scale(head.dtype, mix)
    grad_hidden = torch.empty_like(student_hidden, dtype=wide) if needs[0] else None
    grad_head = torch.zeros_like(student_head, dtype=wide) if needs[1] else None
    ce_sum, kd_sum = student_hidden.new_zeros(2, dtype=wide)
    size = max(1, chunk_elements // vocabulary)
    for start in range(0, tokens, size):
        part = slice(start, min(start + size, tokens))
        hidden = student_hidden[part]
        of_chunk = None if divergence is None else partial(divergence, part)
        logits = F.linear(hidden, head).to(wide)
        ce, kd, grad = _sums_and_gradient(logits, of_chunk, labels[part], mix)
        ce_sum += ce
        kd_sum += kd
        grad = grad.mul_(scale).to(head.dtype)
        if grad_hidden is not None:
            product(grad_hidden[part], grad, head)
        if grad_head is not None:
            product(grad_head, grad.T, hidden, add=True)
    return Sums(ce_sum, kd_sum, grad_hidden, grad_head, scale)
