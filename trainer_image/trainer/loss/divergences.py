"""The table of divergences between teacher and student: another one is another entry.

The settings take their choices from it, so importing this module must not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """A divergence D(p, q) of the student's distribution q from the teacher's p."""

    sum_and_gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """From log p and log q, both ``[n, V]``: the sum of D over the n tokens, in nats, and its
    gradient ``[n, V]`` by the logits of which q is the softmax. Neither argument may be changed."""
    reference: str
    """Where it is proposed for distillation."""
    kernel_branch: int | None = None
    """Its number in the kernel, from 1 on; one without is computed in chunks on a GPU too."""


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(teacher ‖ student)."""
    p, q = log_p.exp(), log_q.exp()
    return (p * (log_p - log_q)).sum(), q - p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(student ‖ teacher)."""
    q, ratio = log_q.exp(), log_q - log_p
    per_token = (q * ratio).sum(-1, keepdim=True)
    return per_token.sum(), q * (ratio - per_token)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """½ KL(teacher ‖ m) + ½ KL(student ‖ m) with m = ½ (teacher + student)."""
    p, q = log_p.exp(), log_q.exp()
    log_m = log_p.logaddexp(log_q) - math.log(2.0)
    ratio = log_q - log_m
    student_part = (q * ratio).sum(-1, keepdim=True)
    total = 0.5 * (p * (log_p - log_m)).sum() + 0.5 * student_part.sum()
    return total, 0.5 * q * (ratio - student_part)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(_forward_kl, "Hinton et al., 2015, arXiv:1503.02531", 1),
    "reverse_kl": Divergence(_reverse_kl, "Gu et al., 2023, arXiv:2306.08543", 2),
    "jsd": Divergence(_jensen_shannon, "Agarwal et al., 2023, arXiv:2306.13649, beta ½", 3),
}
"""By the names that ``--kd_scheme`` takes."""

LINEAR_SCHEME = "forward_kl"
"""The one that is linear in the teacher's distribution: an unbiased estimate of that gives one of
the divergence."""
