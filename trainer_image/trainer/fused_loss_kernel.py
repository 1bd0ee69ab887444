"""The Triton kernel of `trainer.fused_loss`: one program per token.

Exponentials are taken to base 2, the hardware's own. A row's softmax at temperature T is kept as
``pivot``, the largest exponent log2(e) · z / T met so far, and ``total``, the sum of
2^(exponent − pivot); its normalizer is then pivot + log2(total). Pivots of bf16 rows carry no
rounding that total does not share, so the two together stay exact to fp32.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from trainer.distill import Mix

BLOCK = 4096
"""Vocabulary entries that a program takes at a time."""
WARPS = 8

_SCHEMES = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3}


@triton.jit
def _block(row, cols, padded, vocabulary):  # type: ignore[no-untyped-def]
    """Logits in fp32. Past the vocabulary: finite, so that differences stay numbers, and so low
    that their exponential is 0."""
    z = tl.load(row + cols, mask=cols < padded, other=0.0).to(tl.float32)
    return tl.where(cols < vocabulary, z, -1.0e30)


@triton.jit
def _teacher_block(row, bias, cols, padded, vocabulary, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    z = _block(row, cols, padded, vocabulary)
    if HAS_BIAS:
        z += tl.load(bias + cols, mask=cols < padded, other=0.0)
    return z


@triton.jit
def _mean_log_ratio(log_own, log_other):  # type: ignore[no-untyped-def]
    """log2(own / m) with m = (own + other) / 2, from log2 of both; finite for any finite two."""
    gap = log_other - log_own
    return 1.0 - tl.maximum(gap, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(gap)))


@triton.jit
def _loss_and_gradient(  # type: ignore[no-untyped-def]
    student,  # [n, V_p] logits
    output,  # [n, V_p]; may be the same memory: an entry is read before it is written
    teacher,  # [n, V_p] logits, unless SCHEME is 0
    bias,  # [V_p] in fp32, if HAS_BIAS
    labels,  # [n]
    ce_out,  # [n] in fp32, if HAS_CE
    kd_out,  # [n] in fp32, unless SCHEME is 0
    vocabulary,
    padded,
    alpha,
    temperature,
    SCHEME: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,  # T is 1: one student softmax serves both terms
    BLOCK: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    LN2: tl.constexpr = 0.6931471805599453
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * padded
    g_row = output + row * padded
    t_row = teacher + row * padded
    label = tl.load(labels + row)
    s_label = tl.load(s_row + label).to(tl.float32)
    sharp = LOG2E / temperature  # exponent per logit at temperature T
    shift = 0.0
    t_label = 0.0
    if SCHEME != 0:
        t_label = tl.load(t_row + label).to(tl.float32)
        if HAS_BIAS:
            t_label += tl.load(bias + label)
        # Softmaxes ignore a constant; taken out, it does not cost the divergence its digits
        shift = t_label - s_label
    offsets = tl.arange(0, BLOCK)

    # ── first pass: normalizers, and the sum of the two KLs ──
    s_pivot = -1.0e38
    s_top = -1.0e38
    t_pivot = -1.0e38
    one = tl.zeros([BLOCK], tl.float32)  # student at 1
    own = tl.zeros([BLOCK], tl.float32)  # student at T
    other = tl.zeros([BLOCK], tl.float32)  # teacher at T
    cross = tl.zeros([BLOCK], tl.float32)  # weighted differences of logits
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = _block(s_row, cols, padded, vocabulary)
        highest = tl.max(z, 0)
        if HAS_CE:
            pivot = tl.maximum(s_top, highest * LOG2E)
            one = one * tl.exp2(s_top - pivot) + tl.exp2(z * LOG2E - pivot)
            s_top = pivot
        if SCHEME != 0:
            t = _teacher_block(t_row, bias, cols, padded, vocabulary, HAS_BIAS)
            if not (UNIT and HAS_CE):
                pivot = tl.maximum(s_pivot, highest * sharp)
                fade = tl.exp2(s_pivot - pivot)
                power = tl.exp2(z * sharp - pivot)
                own = own * fade + power
                s_pivot = pivot
                if SCHEME == 2:
                    cross = cross * fade + power * (z - t + shift)
            elif SCHEME == 2:
                cross = cross * tl.exp2(s_pivot - s_top) + tl.exp2(z * LOG2E - s_top) * (
                    z - t + shift
                )
                s_pivot = s_top
            pivot = tl.maximum(t_pivot, tl.max(t, 0) * sharp)
            fade = tl.exp2(t_pivot - pivot)
            power = tl.exp2(t * sharp - pivot)
            other = other * fade + power
            t_pivot = pivot
            if SCHEME == 1:
                cross = cross * fade + power * (t - z - shift)
    s_one = 0.0
    if HAS_CE:
        total = tl.log2(tl.sum(one, 0))
        s_one = s_top + total
        tl.store(ce_out + row, ((s_top - s_label * LOG2E) + total) * LN2)
    s_norm = 0.0
    t_norm = 0.0
    gap = 0.0
    kd = 0.0
    if SCHEME != 0:
        if UNIT and HAS_CE:
            s_pivot = s_top
            own = one
        s_sum = tl.sum(own, 0)
        t_sum = tl.sum(other, 0)
        s_norm = s_pivot + tl.log2(s_sum)
        t_norm = t_pivot + tl.log2(t_sum)
        # log2 of teacher's over student's probability of the label
        s_surprise = (s_pivot - s_label * sharp) + tl.log2(s_sum)
        t_surprise = (t_pivot - t_label * sharp) + tl.log2(t_sum)
        gap = (s_surprise - t_surprise) * LN2
        if SCHEME == 1:
            kd = tl.sum(cross, 0) / t_sum / temperature + gap
        if SCHEME == 2:
            kd = tl.sum(cross, 0) / s_sum / temperature - gap

    # ── the Jensen-Shannon divergence needs normalized probabilities ──
    student_part = 0.0
    if SCHEME == 3:
        own = tl.zeros([BLOCK], tl.float32)
        other = tl.zeros([BLOCK], tl.float32)
        for start in range(0, padded, BLOCK):
            cols = start + offsets
            log_q = _block(s_row, cols, padded, vocabulary) * sharp - s_norm
            log_p = _teacher_block(t_row, bias, cols, padded, vocabulary, HAS_BIAS) * sharp - t_norm
            own += tl.exp2(log_q) * _mean_log_ratio(log_q, log_p)
            other += tl.exp2(log_p) * _mean_log_ratio(log_p, log_q)
        student_part = tl.sum(own, 0)
        kd = 0.5 * LN2 * (student_part + tl.sum(other, 0))
    if SCHEME != 0:
        tl.store(kd_out + row, kd)

    # ── last pass: the gradient ──
    weight = alpha * temperature  # T² from the loss, 1 / T from the chain rule
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = _block(s_row, cols, padded, vocabulary)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_CE:
            one = tl.exp2(z * LOG2E - s_one)
            gradient = (1.0 - alpha) * tl.where(cols == label, one - 1.0, one)
        if SCHEME != 0:
            t = _teacher_block(t_row, bias, cols, padded, vocabulary, HAS_BIAS)
            log_q = z * sharp - s_norm
            q = one if UNIT and HAS_CE else tl.exp2(log_q)
            if SCHEME == 1:
                gradient += weight * (q - tl.exp2(t * sharp - t_norm))
            if SCHEME == 2:
                ratio = (z - t + shift) / temperature - gap
                gradient += weight * q * (ratio - kd)
            if SCHEME == 3:
                ratio = _mean_log_ratio(log_q, t * sharp - t_norm)
                gradient += (0.5 * LN2) * weight * q * (ratio - student_part)
        gradient = tl.where(cols < vocabulary, gradient, 0.0)
        tl.store(g_row + cols, gradient.to(output.dtype.element_ty), mask=cols < padded)


def launch(
    logits: Tensor,
    gradient: Tensor,
    targets: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    per_token: Tensor,
    mix: Mix,
    vocabulary: int,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
) -> None:
    """Loss per token, and the gradient of the mixed loss's sum by the student's logits.

    Args:
        logits: ``[n, V_p]``, the student's; columns from ``vocabulary`` on are ignored.
        gradient: ``[n, V_p]``, written; 0 from column ``vocabulary`` on. May be ``logits``.
        targets: the teacher's, without its bias; None when alpha is 0.
        bias: ``[V_p]`` in fp32, or None.
        labels: ``[n]``.
        per_token: ``[2, n]``: CE (left alone when alpha is 1) and divergence (left alone when
            alpha is 0), in nats.
        mix: alpha, temperature and divergence.
        vocabulary: entries of a row that are no padding.
        block: vocabulary entries taken at a time, a power of two.
        warps: warps per program.
    """
    rows, padded = logits.shape
    scheme = 0 if targets is None else _SCHEMES[mix.scheme]
    _loss_and_gradient[(rows,)](
        logits,
        gradient,
        logits if targets is None else targets,
        logits if bias is None else bias,
        labels,
        per_token[0],
        per_token[1],
        vocabulary,
        padded,
        float(mix.alpha),
        float(mix.temperature),
        SCHEME=scheme,
        HAS_CE=mix.alpha < 1.0,
        HAS_BIAS=bias is not None,
        UNIT=math.isclose(mix.temperature, 1.0, rel_tol=0.0, abs_tol=0.0),
        BLOCK=block,
        num_warps=warps,
    )
