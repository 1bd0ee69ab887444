"""The Triton kernel of `trainer.loss.fused` for a sparse estimate of the teacher's distribution.

One program per token, as in `trainer.loss.kernel`, whose conventions these are: one pass over the
row of logits for the softmaxes at temperature 1 and at T, one that overwrites it by the gradient.
The few ids of the estimate are read between the two, and their gradients are written last.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from trainer.loss.chunked import Mix
from trainer.loss.kernel import BLOCK, DONE_WITH, LN2, LOG2E, READ_AGAIN, WARPS, as_logits, read_row
from trainer.loss.sparse import SparseTargets


@triton.jit
def _student_sums(row, vocabulary, padded, sharp, UNIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit, and the sums of exponentials relative to it at 1 and at T."""
    offsets = tl.arange(0, BLOCK)
    top = -1.0e30
    one = tl.zeros([BLOCK], tl.float32)
    own = tl.zeros([BLOCK], tl.float32)
    raw = read_row(row, offsets, padded, READ_AGAIN)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        z = as_logits(raw, row, cols, padded, vocabulary, False)
        raw = read_row(row, cols + BLOCK, padded, READ_AGAIN)
        highest = tl.maximum(top, tl.max(z, 0))
        one = one * tl.exp2((top - highest) * LOG2E) + tl.exp2(z * LOG2E - highest * LOG2E)
        if not UNIT:
            own = own * tl.exp2((top - highest) * sharp) + tl.exp2(z * sharp - highest * sharp)
        top = highest
    if UNIT:
        own = one
    return top, tl.sum(one, 0), tl.sum(own, 0)


@triton.jit
def _sparse_loss_and_gradient(  # type: ignore[no-untyped-def]
    student,  # [n, V_p] logits; the gradient replaces them
    ids,  # [n, K]
    weights,  # [n, K] in fp32
    negentropy,  # [n] in fp32
    labels,  # [n]
    ce_out,  # [n] in fp32
    kd_out,  # [n] in fp32
    vocabulary,
    padded,
    entries,  # K
    temperature,
    ce_weight,  # factor of the gradient of CE
    kd_weight,  # factor of the gradient of the divergence
    HAS_CE: tl.constexpr,
    UNIT: tl.constexpr,  # T is 1: one softmax serves both terms
    BLOCK: tl.constexpr,
    PLACES: tl.constexpr,  # K, up to a power of 2
):
    program = tl.program_id(0).to(tl.int64)
    row = student + program * padded
    label = tl.load(labels + program)
    s_label = tl.load(row + label).to(tl.float32)
    sharp = LOG2E / temperature
    places = tl.arange(0, PLACES)
    there = places < entries
    id = tl.load(ids + program * entries + places, mask=there, other=0)
    weight = tl.load(weights + program * entries + places, mask=there, other=0.0)
    used = weight > 0.0
    z = tl.load(row + id, mask=used, other=0.0).to(tl.float32)
    top, one, own = _student_sums(row, vocabulary, padded, sharp, UNIT, BLOCK)
    s_one = top * LOG2E + tl.log2(one)
    s_norm = top * sharp + tl.log2(own)
    if HAS_CE:
        tl.store(ce_out + program, ((top - s_label) * LOG2E + tl.log2(one)) * LN2)
    total = tl.sum(weight, 0)
    # log q relative to the largest logit, so that a constant in the logits costs no digits
    surprise = tl.log2(own) - (z - top) * sharp
    cross = tl.sum(weight * surprise, 0) * LN2
    tl.store(kd_out + program, tl.load(negentropy + program) + cross)
    # The logits of ids and label have been read by all threads before any is overwritten
    tl.debug_barrier()
    offsets = tl.arange(0, BLOCK)
    raw = read_row(row, offsets, padded, DONE_WITH)
    for start in range(0, padded, BLOCK):
        cols = start + offsets
        logits = as_logits(raw, row, cols, padded, vocabulary, False)
        raw = read_row(row, cols + BLOCK, padded, DONE_WITH)
        gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_CE:
            q_one = tl.exp2(logits * LOG2E - s_one)
            gradient = ce_weight * tl.where(cols == label, q_one - 1.0, q_one)
        q = q_one if UNIT and HAS_CE else tl.exp2(logits * sharp - s_norm)
        gradient += kd_weight * total * q
        gradient = tl.where(cols < vocabulary, gradient, 0.0).to(row.dtype.element_ty)
        tl.store(row + cols, gradient, mask=cols < padded, eviction_policy=DONE_WITH)
    # Whoever wrote the row's entry at an id has done so before it is written again
    tl.debug_barrier()
    sparse = kd_weight * (total * tl.exp2(z * sharp - s_norm) - weight)
    if HAS_CE:
        q_one = tl.exp2(z * LOG2E - s_one)
        sparse += ce_weight * tl.where(id == label, q_one - 1.0, q_one)
    tl.store(row + id, sparse.to(row.dtype.element_ty), mask=used)


def launch(
    logits: Tensor,
    targets: SparseTargets,
    labels: Tensor,
    per_token: Tensor,
    mix: Mix,
    vocabulary: int,
    *,
    gradient_scale: float = 1.0,
) -> None:
    """Loss per token, and the gradient of the mixed loss's sum by the student's logits.

    Arguments as of `trainer.loss.kernel.launch`, with contiguous ``targets`` of these tokens in
    place of the teacher's logits.
    """
    rows, padded = logits.shape
    entries = targets.ids.shape[1]
    _sparse_loss_and_gradient[(rows,)](
        logits,
        targets.ids,
        targets.weights,
        targets.negentropy,
        labels,
        per_token[0],
        per_token[1],
        vocabulary,
        padded,
        entries,
        float(mix.temperature),
        gradient_scale * (1.0 - mix.alpha),
        # T² from the loss, 1 / T from the chain rule
        gradient_scale * mix.alpha * mix.temperature,
        HAS_CE=mix.alpha < 1.0,
        UNIT=mix.temperature == 1.0,
        BLOCK=BLOCK,
        PLACES=triton.next_power_of_2(entries),
        num_warps=WARPS,
    )
