"""The same loss by other libraries, each at its best settings, and the step around them.

Every loss here takes student hidden ``[N, D_s]`` and head, teacher hidden ``[N, D_t]`` and head,
and labels, and returns ``alpha · T² · KL(teacher_T ‖ student_T) + (1 − alpha) · CE``. Where a
library leaves T² out, it is put into the weight that the library takes.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def full_logits(alpha: float, temperature: float) -> Loss:
    """What a Hugging Face training script computes, compiled: both logits in full."""

    def loss(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(hidden, head.to(hidden.dtype)).float()
        targets = F.linear(t_hidden, t_head).float()
        kd = F.kl_div(
            F.log_softmax(logits / temperature, -1),
            F.log_softmax(targets / temperature, -1),
            log_target=True,
            reduction="batchmean",
        )
        return alpha * temperature**2 * kd + (1 - alpha) * F.cross_entropy(logits, y)

    return torch.compile(loss, dynamic=False)


def _load_alone(package: str, path: str) -> ModuleType:
    """One module of a package whose import would ask for more packages than it needs."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed")
    file = Path(found.submodule_search_locations[0]) / path
    spec = importlib.util.spec_from_file_location(f"{package}_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # the compiler looks functions' modules up by name
    spec.loader.exec_module(module)
    return module


def torchtune_chunked(alpha: float, temperature: float, chunks: int = 8) -> Loss:
    """torchtune's ForwardKLWithChunkedOutputLoss and CEWithChunkedOutputLoss, compiled.

    Its losses know no temperature, so they are given logits divided by it. What it calls KL is
    the cross entropy with the teacher: larger by `teacher_entropy`, with the same gradient.
    """
    kd_losses = _load_alone("torchtune", "modules/loss/kd_losses.py")
    kd_loss = kd_losses.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)
    ce_losses = _load_alone("torchtune", "modules/loss/ce_chunked_output_loss.py")
    ce_loss = ce_losses.CEWithChunkedOutputLoss(num_output_chunks=chunks)

    def loss(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, y: Tensor) -> Tensor:
        head = head.to(hidden.dtype)
        parts = [F.linear(part, head)[None] for part in hidden.chunk(chunks)]
        targets = [F.linear(part, t_head)[None] / temperature for part in t_hidden.chunk(chunks)]
        kd = kd_loss([part / temperature for part in parts], targets, y[None])
        return alpha * temperature**2 * kd + (1 - alpha) * ce_loss(parts, y[None])

    return torch.compile(loss, dynamic=False)


@torch.no_grad()
def teacher_entropy(t_hidden: Tensor, t_head: Tensor, temperature: float) -> float:
    """Mean entropy of the teacher at a temperature, in nats."""
    total = 0.0
    for part in t_hidden.split(1024):
        log_p = F.log_softmax(F.linear(part, t_head).float() / temperature, -1)
        total -= float((log_p.exp() * log_p).sum())
    return total / len(t_hidden)


def liger(alpha: float, temperature: float, chunk: int = 4096) -> Loss:
    """Liger's LigerFusedLinearJSDLoss at beta 0, which is forward KL."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - alpha,
        weight_soft_loss=alpha * temperature**2,
        beta=0.0,
        temperature=temperature,
        chunk_size=chunk,
    )

    def loss(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, y: Tensor) -> Tensor:
        return function(hidden, head.to(hidden.dtype), t_hidden, t_head, y)

    return loss


def trl(alpha: float, temperature: float) -> Loss:
    """TRL's generalized_jsd_loss at beta 0, on full logits, compiled."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    def loss(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, y: Tensor) -> Tensor:
        logits, targets = F.linear(hidden, head.to(hidden.dtype)), F.linear(t_hidden, t_head)
        kd = GKDTrainer.generalized_jsd_loss(
            logits.float(), targets.float(), beta=0, temperature=temperature
        )
        return alpha * temperature**2 * kd + (1 - alpha) * F.cross_entropy(logits.float(), y)

    return torch.compile(loss, dynamic=False)


def orda(alpha: float, temperature: float) -> Loss:
    """orda-kernel's loss for a frozen teacher with its own head; multiplies by T² itself."""
    from orda_kernel.ops.separate_teacher import separate_distillation_loss

    def loss(hidden: Tensor, head: Tensor, t_hidden: Tensor, t_head: Tensor, y: Tensor) -> Tensor:
        return separate_distillation_loss(
            hidden,
            t_hidden,
            head.to(hidden.dtype),
            t_head,
            y,
            student_ce_weight=1 - alpha,
            kl_weight=alpha,
            kl_temperature=temperature,
        )[0]

    return loss


class PeerStep:
    """A whole step of stock Hugging Face GPT-2s, both bodies compiled, around a peer's loss.

    Args:
        student: a `GPT2LMHeadModel` in fp32; computes in bf16 under autocast.
        bodies: the student's and the teacher's, compiled.
        teacher_head: ``[V, D_t]``.
        loss: one of this module's.
        learning_rate: of fused AdamW.
    """

    def __init__(
        self,
        student: Any,
        bodies: tuple[Any, Any],
        teacher_head: Tensor,
        loss: Loss,
        learning_rate: float,
    ) -> None:
        self.student = student
        self.body, self.teacher_body = bodies
        self.teacher_head, self.loss = teacher_head, loss
        self.optimizer = torch.optim.AdamW(
            student.parameters(), lr=learning_rate, betas=(0.9, 0.95), fused=True
        )

    @torch.no_grad()
    def targets(self, ids: Tensor) -> Tensor:
        hidden = self.teacher_body(input_ids=ids, use_cache=False).last_hidden_state
        return hidden.flatten(0, 1)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        targets = self.targets(ids)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).bfloat16()
        head = self.student.lm_head.weight
        return self.loss(hidden, head, targets, self.teacher_head, labels.flatten())

    def step(self, ids: Tensor, labels: Tensor) -> Tensor:
        loss = self.forward(ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()
