"""Evaluation at several contexts, in training and as a stage of its own.

    python -m trainer.evaluate OUT_DIR CHECKPOINT [CHECKPOINT …] --teacher_name=… \
        --dataset_name=… --eval_ctx_lens=512,1024
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.config import TrainConfig
from trainer.log import log
from trainer.positions import resize_positions
from trainer.precision import Precision
from trainer.student import Student
from trainer.teacher import Teacher
from trainer.tokens import IGNORED, TokenStreams, evaluation_batches

_CHUNK_ELEMENTS = 1 << 26


@torch.no_grad()
def cross_entropy_sum(hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Sum of cross entropies in fp64, in nats, over labels that are not `IGNORED`.

    Args:
        hidden: ``[N, D]``.
        head: ``[V, D]``.
        bias: ``[V]`` or None.
        labels: ``[N]``.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    head = head.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    for part, wanted in zip(
        hidden.split(max(1, _CHUNK_ELEMENTS // head.shape[0])),
        labels.split(max(1, _CHUNK_ELEMENTS // head.shape[0])),
        strict=True,
    ):
        logits = F.linear(part, head, bias).float()
        losses = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="none")
        total += losses.double().sum()
    return total


def mean_loss(
    hidden: Callable[[Tensor], Tensor],
    head: Tensor,
    bias: Tensor | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> float:
    """Token-weighted mean cross entropy in nats over batches of inputs and labels ``[B, T]``."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    for inputs, labels in batches:
        tokens += int((labels != IGNORED).sum())
        states = hidden(inputs.to(device, non_blocking=True))
        total += cross_entropy_sum(
            states.flatten(0, 1), head, bias, labels.flatten().to(device, non_blocking=True)
        )
    return float(total) / tokens


class Evaluator:
    """Student and teacher losses over the validation split at every context of a run.

    The teacher never changes, so each of its losses is computed once.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: TokenStreams,
        teacher: Teacher | None,
        precision: Precision,
    ) -> None:
        self.config = config
        self.streams = streams
        self.teacher = teacher
        self.precision = precision
        self._teacher_losses: dict[int, float] = {}

    def metrics(self, student: Student, trained_positions: int) -> dict[str, float]:
        """``val_loss_student@512``, ``val_ppl_student@512``, ``val_loss_teacher@512``, …

        The same names without ``@`` are those of the training context.
        """
        metrics: dict[str, float] = {}
        for context in self.config.contexts:
            losses = {"student": self.student_loss(student, context, trained_positions)}
            teacher_loss = self.teacher_loss(context, student.config.vocab_size)
            if teacher_loss is not None:
                losses["teacher"] = teacher_loss
            for who, loss in losses.items():
                values = {f"val_loss_{who}": loss, f"val_ppl_{who}": math.exp(min(loss, 700.0))}
                metrics |= {f"{name}@{context}": value for name, value in values.items()}
                if context == self.config.block_size:
                    metrics |= values
        return metrics

    def student_loss(
        self, student: Student, context: int, trained_positions: int, *, raw: bool = False
    ) -> float:
        """Mean loss in nats at a context.

        Past the trained positions the table is used as `resize_positions` would make it, unless
        ``raw``; the weights stay as they are.
        """
        table = None
        if student.pos is not None and context > trained_positions and not raw:
            table = resize_positions(
                student.pos.weight.detach(), trained_positions, context, self.config.pos_resize
            )
        was_training = student.training
        student.eval()
        try:
            with torch.inference_mode(), self.precision.autocast():
                return mean_loss(
                    lambda ids: student(ids, table),
                    student.lm_head.weight,
                    None,
                    self._batches(context),
                    self.precision.device,
                )
        finally:
            student.train(was_training)

    def teacher_loss(self, context: int, vocab_size: int) -> float | None:
        """Mean loss in nats at a context, None where there is no teacher or it is too long."""
        teacher = self.teacher
        if teacher is None:
            return None
        if context not in self._teacher_losses:
            longest = teacher.spec.max_context
            if longest is not None and context > longest:
                log.info(
                    "context %d is past the teacher's %d positions: student only", context, longest
                )
                self._teacher_losses[context] = math.nan
            else:
                bias = None if teacher.bias is None else teacher.bias[:vocab_size]
                with torch.inference_mode():
                    self._teacher_losses[context] = mean_loss(
                        teacher.hidden,
                        teacher.head[:vocab_size],
                        bias,
                        self._batches(context),
                        self.precision.device,
                    )
        loss = self._teacher_losses[context]
        return None if math.isnan(loss) else loss

    def _batches(self, context: int) -> Iterable[tuple[Tensor, Tensor]]:
        tokens_per_batch = self.config.micro_batch * self.config.context
        return evaluation_batches(
            self.streams.validation,
            context=context,
            batch=max(1, tokens_per_batch // context),
            max_tokens=self.config.eval_max_tokens,
        )
