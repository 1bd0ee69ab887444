"""The Triton kernel of `trainer.loss.fused`: one program per token.

Exponentials are taken to base 2, which the hardware computes: with s = log2(e) / T, the softmax of
logits z at temperature T is 2^(s · z − n), where the normalizer n is s · top + log2 Σ 2^(s · z −
s · top) and top the largest logit.

In names, ``s_`` is the student's and ``t_`` the teacher's; ``one`` is the student's at temperature
1, ``own`` the student's at T and ``other`` the teacher's at T.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trainer.loss.chunked import Mix
from trainer.loss.divergences import DIVERGENCES

BLOCK = 2048
"""Vocabulary entries that a program takes at a time."""

WARPS = 8

LOG2E = tl.constexpr(1.4426950408889634)

LN2 = tl.constexpr(0.6931471805599453)

READ_AGAIN = tl.constexpr("evict_last")
"""The L2 cache holds the rows of all running programs as long as it evicts finished ones first."""

DONE_WITH = tl.constexpr("evict_first")

# Values of SCHEME; 0 is cross entropy alone
FORWARD_KL = tl.constexpr(DIVERGENCES["forward_kl"].kernel_branch)
REVERSE_KL = tl.constexpr(DIVERGENCES["reverse_kl"].kernel_branch)
JENSEN_SHANNON = tl.constexpr(DIVERGENCES["jsd"].kernel_branch)


@triton.jit
def read_row(row, cols, padded, EVICT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Entries of a row in their stored type; 0 past its end."""
    return tl.load(row + cols, mask=cols < padded, other=0.0, eviction_policy=EVICT)


@triton.jit
def as_logits(raw, bias, cols, padded, vocabulary, HAS_BIAS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in fp32. Those past the vocabulary are so low that their exponential is 0, yet finite,
    so that no difference of two is NaN."""
    z = raw.to(tl.float32)
    if HAS_BIAS:
        z += read_row(bias, cols, padded, READ_AGAIN)
    return tl.where(cols < vocabulary, z, -1.0e30)


@triton.jit
def _larger_of_each(a, b, other_a, other_b):  # type: ignore[no-untyped-def]
    return tl.maximum(a, other_a), tl.maximum(b, other_b)


@triton.jit
def _mean_log_ratio(log_own, log_other):  # type: ignore[no-untyped-def]
    """log2(own / m) with m = (own + other) / 2, from log2 of both; finite where both are."""
    gap = log_other - log_own
    return 1.0 - tl.maximum(gap, 0.0) - tl.log2(1.0 + tl.exp2(-tl.abs(gap)))


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    s_row,
    t_row,
    bias,
    vocabulary,
    padded,
    sharp,
    shift,
    SCHEME: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over both rows.

    Returns the largest logits of student and teacher; the sums of exponentials relative to them,
    of the student at 1 and at T and of the teacher at T; and the sum of differences of logits,
    weighted by the exponentials of the teacher (forward KL) or the student (reverse KL).
    """
    offsets = tl.arange(0, BLOCK)
    top = -1.0e30
    t_top = -1.0e30
    one = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    cross = tl.zeros([BLOCK], tl.float32)
    # Each block is loaded while the one before it is being reduced
    raw = read_row(s_row, offsets, padded, READ_AGAIN)
    if SCHEME != 0:
        t_raw = read_row(t_row, offsets, padded, READ_AGAIN)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = as_logits(raw, bias, cols, padded, vocabulary, False)
        raw = read_row(s_row, cols + BLOCK, padded, READ_AGAIN)
        if SCHEME == 0:
            highest = tl.maximum(top, tl.max(z, 0))
        else:
            t = as_logits(t_raw, bias, cols, padded, vocabulary, HAS_BIAS)
            t_raw = read_row(t_row, cols + BLOCK, padded, READ_AGAIN)
            highest, t_highest = tl.reduce((z, t), 0, _larger_of_each)
            highest = tl.maximum(top, highest)
            t_highest = tl.maximum(t_top, t_highest)
        if HAS_CE:
            fade = tl.exp2((top - highest) * LOG2E)
            power = tl.exp2(z * LOG2E - highest * LOG2E)
            one = one * fade + power
        if SCHEME != 0:
            if not (UNIT and HAS_CE):
                fade = tl.exp2((top - highest) * sharp)
                power = tl.exp2(z * sharp - highest * sharp)
                own = own * fade + power
            if SCHEME == REVERSE_KL:
                cross = cross * fade + power * (z - t + shift)
            fade = tl.exp2((t_top - t_highest) * sharp)
            power = tl.exp2(t * sharp - t_highest * sharp)
            other = other * fade + power
            if SCHEME == FORWARD_KL:
                cross = cross * fade + power * (t - z - shift)
            t_top = t_highest
        top = highest
    if UNIT and HAS_CE:
        own = one
    return top, t_top, tl.sum(one, 0), tl.sum(own, 0), tl.sum(other, 0), tl.sum(cross, 0)


@triton.jit
def _jensen_shannon(  # type: ignore[no-untyped-def]
    s_row,
    t_row,
    bias,
    vocabulary,
    padded,
    sharp,
    s_norm,
    t_norm,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A further pass, once the normalizers are known: KL(student ‖ m), KL(teacher ‖ m) in bits."""
    offsets = tl.arange(0, BLOCK)
    own = tl.zeros([BLOCK], tl.float32)
    other = tl.zeros([BLOCK], tl.float32)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = as_logits(
            read_row(s_row, cols, padded, READ_AGAIN), bias, cols, padded, vocabulary, False
        )
        t = as_logits(
            read_row(t_row, cols, padded, READ_AGAIN), bias, cols, padded, vocabulary, HAS_BIAS
        )
        log_q = z * sharp - s_norm
        log_p = t * sharp - t_norm
        own += tl.exp2(log_q) * _mean_log_ratio(log_q, log_p)
        other += tl.exp2(log_p) * _mean_log_ratio(log_p, log_q)
    return tl.sum(own, 0), tl.sum(other, 0)


@triton.jit
def _write_gradient(  # type: ignore[no-untyped-def]
    s_row,
    t_row,
    bias,
    label,
    vocabulary,
    padded,
    sharp,
    shift,
    gap,
    s_one,
    s_norm,
    t_norm,
    mean,  # of the log ratio under the student: in nats (reverse KL) or bits (Jensen-Shannon)
    ce_weight,
    kd_weight,
    SCHEME: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The last pass: overwrites the student's logits by the gradient, block by block."""
    offsets = tl.arange(0, BLOCK)
    raw = read_row(s_row, offsets, padded, DONE_WITH)
    if SCHEME != 0:
        t_raw = read_row(t_row, offsets, padded, DONE_WITH)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = as_logits(raw, bias, cols, padded, vocabulary, False)
        raw = read_row(s_row, cols + BLOCK, padded, DONE_WITH)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_CE:
            one = tl.exp2(z * LOG2E - s_one)
            gradient = ce_weight * tl.where(cols == label, one - 1.0, one)
        if SCHEME != 0:
            t = as_logits(t_raw, bias, cols, padded, vocabulary, HAS_BIAS)
            t_raw = read_row(t_row, cols + BLOCK, padded, DONE_WITH)
            log_q = z * sharp - s_norm
            q = one if UNIT and HAS_CE else tl.exp2(log_q)
            if SCHEME == FORWARD_KL:
                gradient += kd_weight * (q - tl.exp2(t * sharp - t_norm))
            if SCHEME == REVERSE_KL:
                ratio = (z - t + shift) * (sharp * LN2) - gap
                gradient += kd_weight * q * (ratio - mean)
            if SCHEME == JENSEN_SHANNON:
                ratio = _mean_log_ratio(log_q, t * sharp - t_norm)
                gradient += (0.5 * LN2) * kd_weight * q * (ratio - mean)
        gradient = tl.where(cols < vocabulary, gradient, 0.0)
        gradient = gradient.to(s_row.dtype.element_ty)
        tl.store(s_row + cols, gradient, mask=cols < padded, eviction_policy=DONE_WITH)


@triton.jit
def _loss_and_gradient(  # type: ignore[no-untyped-def]
    student,  # [n, V_p] logits; the gradient replaces them
    teacher,  # [n, V_p] logits, unless SCHEME is 0
    bias,  # [V_p] in fp32, if HAS_BIAS
    labels,  # [n]
    ce_out,  # [n] in fp32, if HAS_CE
    kd_out,  # [n] in fp32, unless SCHEME is 0
    vocabulary,
    padded,
    temperature,
    ce_weight,  # factor of the gradient of CE
    kd_weight,  # factor of the gradient of the divergence
    SCHEME: tl.constexpr,
    HAS_CE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    UNIT: tl.constexpr,  # T is 1: one student softmax serves both terms
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    s_row = student + row * padded
    t_row = teacher + row * padded
    label = tl.load(labels + row)
    s_label = tl.load(s_row + label).to(tl.float32)
    sharp = LOG2E / temperature
    shift = 0.0
    t_label = 0.0
    if SCHEME != 0:
        t_label = tl.load(t_row + label).to(tl.float32)
        if HAS_BIAS:
            t_label += tl.load(bias + label)
        # Softmaxes ignore constants, but one in the difference of logits would cost it digits
        shift = t_label - s_label
    # fmt: off
    top, t_top, one, own, other, cross = _sums(
        s_row, t_row, bias, vocabulary, padded, sharp, shift,
        SCHEME, HAS_CE, HAS_BIAS, UNIT, BLOCK,
    )
    s_one = top * LOG2E + tl.log2(one)
    if HAS_CE:
        tl.store(ce_out + row, ((top - s_label) * LOG2E + tl.log2(one)) * LN2)
    s_norm = 0.0
    t_norm = 0.0
    gap = 0.0
    mean = 0.0
    if SCHEME != 0:
        s_norm = top * sharp + tl.log2(own)
        t_norm = t_top * sharp + tl.log2(other)
        # Log of the teacher's over the student's probability of the label
        s_surprise = (top - s_label) * sharp + tl.log2(own)
        gap = (s_surprise - (t_top - t_label) * sharp - tl.log2(other)) * LN2
        if SCHEME == FORWARD_KL:
            kd = cross / other / temperature + gap
        elif SCHEME == REVERSE_KL:
            kd = cross / own / temperature - gap
            mean = kd
        else:
            tl.static_assert(SCHEME == JENSEN_SHANNON, "no branch for this divergence")
            mean, t_mean = _jensen_shannon(
                s_row, t_row, bias, vocabulary, padded, sharp, s_norm, t_norm, HAS_BIAS, BLOCK
            )
            kd = 0.5 * LN2 * (mean + t_mean)
        tl.store(kd_out + row, kd)
    _write_gradient(
        s_row, t_row, bias, label, vocabulary, padded, sharp, shift, gap, s_one, s_norm, t_norm,
        mean, ce_weight, kd_weight, SCHEME, HAS_CE, HAS_BIAS, UNIT, BLOCK,
    )


    # fmt: on


def launch(
    logits: Tensor,
    teacher_logits: Tensor | None,
    bias: Tensor | None,
    labels: Tensor,
    per_token: Tensor,
    mix: Mix,
    vocabulary: int,
    *,
    gradient_scale: float = 1.0,
) -> None:
    """Loss per token, and the gradient of the mixed loss's sum by the student's logits.

    ``logits``, the student's, are replaced by the gradient; their columns from ``vocabulary`` on
    are ignored and become 0. Shapes are those of `_loss_and_gradient`; ``per_token`` is ``[2, n]``:
    CE (left alone when alpha is 1) and divergence (left alone when alpha is 0), in nats.
    ``teacher_logits``, without the bias, are None when alpha is 0. ``gradient_scale`` multiplies
    the gradient, for types of small range.
    """
    rows, padded = logits.shape
    scheme = 0 if teacher_logits is None else DIVERGENCES[mix.scheme].kernel_branch
    _loss_and_gradient[(rows,)](
        logits,
        logits if teacher_logits is None else teacher_logits,
        logits if bias is None else bias,
        labels,
        per_token[0],
        per_token[1],
        vocabulary,
        padded,
        float(mix.temperature),
        gradient_scale * (1.0 - mix.alpha),
        # T² from the loss, 1 / T from the chain rule
        gradient_scale * mix.alpha * mix.temperature,
        SCHEME=scheme,
        HAS_CE=mix.alpha < 1.0,
        HAS_BIAS=bias is not None,
        UNIT=mix.temperature == 1.0,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
