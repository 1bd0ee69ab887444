"""The distillation loss from a sparse estimate of the teacher's distribution.

Stored targets give a few entries of the teacher's distribution at each token, weighted so that
their expectation is the whole of it. The forward KL is linear in that distribution, so loss and
gradient are then unbiased: with the estimate p̂ of p, ``Σ p log p − Σ p̂ log q``. Other divergences
are not linear, and no such estimate of them exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.loss.chunked import (
    CHUNK_ELEMENTS,
    DistillLoss,
    Mix,
    Sums,
    check_student_shapes,
    loss_of_sums,
    over_chunks,
)
from trainer.loss.divergences import LINEAR_SCHEME


class SparseTargets(NamedTuple):
    """An estimate of the teacher's distribution at one temperature, for ``N`` predicted tokens."""

    ids: Tensor
    """``[N, K]``; those of a token with a weight above 0 are distinct."""
    weights: Tensor
    """``[N, K]`` in fp32: estimates of the probabilities of these ids; 0 in unused places. Their
    expectation over the draws, ids that were not drawn having weight 0, is the distribution."""
    negentropy: Tensor
    """``[N]`` in fp32: Σ p log p over the whole vocabulary, in nats."""


def sparse_distill_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    targets: SparseTargets | None,
    labels: Tensor,
    mix: Mix,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> DistillLoss:
    """Loss over ``N`` predicted tokens, as of `trainer.loss.chunked.distill_loss`.

    Args:
        student_hidden: ``[N, D]``, the student's last hidden state; receives a gradient.
        student_head: ``[V, D]``, the student's output embedding; receives a gradient.
        targets: at the temperature of ``mix``; None when ``alpha`` is 0.
        labels: ``[N]`` token ids.
        mix: alpha, temperature, and forward KL.
        chunk_elements: bound on tokens × vocabulary per chunk.

    The divergence that is returned is an estimate: a token's may be negative.

    Raises:
        ValueError: shapes that do not agree, no targets although ``alpha`` > 0, or another
            divergence than forward KL.
    """
    check_sparse(student_hidden, student_head, targets, labels, mix)

    def compute(needs: tuple[bool, ...]) -> Sums:
        divergence = None
        if mix.alpha > 0.0 and targets is not None:

            def divergence(part: slice, log_q: Tensor) -> tuple[Tensor, Tensor]:
                return _sum_and_gradient(SparseTargets(*(field[part] for field in targets)), log_q)

        return over_chunks(
            student_hidden, student_head, divergence, labels, mix, chunk_elements, needs
        )

    return loss_of_sums(student_hidden, student_head, mix, compute)


def check_sparse(
    student_hidden: Tensor,
    student_head: Tensor,
    targets: SparseTargets | None,
    labels: Tensor,
    mix: Mix,
) -> None:
    """Refuse operands that do not fit together.

    Raises:
        ValueError: shapes that do not agree, no targets although alpha > 0, or another divergence
            than forward KL.
    """
    check_student_shapes(student_hidden, student_head, labels)
    if mix.alpha == 0.0:
        return
    if mix.scheme != LINEAR_SCHEME:
        raise ValueError(
            f"no sparse estimate of {mix.scheme!r} is unbiased; only {LINEAR_SCHEME} is linear in"
            " the teacher's distribution"
        )
    if targets is None:
        raise ValueError(f"alpha is {mix.alpha:g}, so targets are needed")
    tokens, shape = len(student_hidden), targets.ids.shape
    if len(shape) != 2 or shape[0] != tokens or targets.weights.shape != shape:
        raise ValueError(
            f"target ids {tuple(shape)} and weights {tuple(targets.weights.shape)} do not agree"
            f" over {tokens} tokens"
        )
    if targets.negentropy.shape != (tokens,):
        raise ValueError(f"negentropy {tuple(targets.negentropy.shape)} for {tokens} tokens")


def _sum_and_gradient(targets: SparseTargets, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of the estimated KL over a chunk, and its gradient, as of `Divergence`."""
    ids, weights = targets.ids.long(), targets.weights.to(log_q.dtype)
    cross = (weights * log_q.gather(1, ids)).sum()
    # A column of q times the sum of weights, which is 1 in expectation: so the gradient of a
    # token sums to 0 over the vocabulary, as that of a loss of softmax does
    gradient = torch.exp(log_q).mul_(weights.sum(1, keepdim=True))
    gradient.scatter_add_(1, ids, -weights)
    return targets.negentropy.to(log_q.dtype).sum() - cross, gradient
