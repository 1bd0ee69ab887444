"""Losses at several contexts over the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.data.batches import IGNORED, evaluation_batches
from trainer.data.streams import TokenStreams
from trainer.models.positions import resize_positions
from trainer.models.student import Student
from trainer.models.teacher import Teacher
from trainer.runtime.errors import UsageError
from trainer.runtime.log import log
from trainer.runtime.processes import Processes
from trainer.runtime.sharding import full_tensor, is_sharded_module
from trainer.settings.config import TrainConfig
from trainer.training.precision import Precision

_EAGER_ELEMENTS, _COMPILED_ELEMENTS = 1 << 26, 1 << 28
"""Logits of a chunk; compiled code holds them in the hidden state's type only, not in fp32."""


class EvaluationStopped(Exception):
    """An evaluation was broken off because the run is to stop."""


@torch.no_grad()
def cross_entropy_sum(
    hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor, *, compiled: bool = False
) -> Tensor:
    """Sum of cross entropies in fp64, in nats, over labels that are not `IGNORED`.

    Args:
        hidden: ``[N, D]``.
        head: ``[V, D]``.
        bias: ``[V]`` or None.
        labels: ``[N]``.
        compiled: use `torch.compile`, for which ``N`` should be the same in every call.
    """
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    head = head.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype)
    chunk_loss = _compiled_chunk_loss() if compiled else _chunk_loss
    elements = len(hidden) * head.shape[0]
    # Parts of nearly equal size have at most two lengths, each of which is compiled
    parts = -(-elements // (_COMPILED_ELEMENTS if compiled else _EAGER_ELEMENTS))
    for part, wanted in zip(hidden.tensor_split(parts), labels.tensor_split(parts), strict=True):
        total += chunk_loss(part, head, bias, wanted)
    return total


def _chunk_loss(hidden: Tensor, head: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head, bias).float()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    return losses.double().sum()


@cache
def _compiled_chunk_loss() -> Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]:
    return torch.compile(_chunk_loss, dynamic=False)


def perplexity(loss: float) -> float:
    """The exponential of a loss in nats; infinity where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


class Evaluator:
    """Student and teacher losses over the validation split at every context of a run.

    The teacher never changes, so each of its losses is computed once. They are those of the body
    that is distilled from: in training with ``--teacher_precision=fp8``, the fp8 one.

    Args:
        config: with the contexts, ``micro_batch`` and ``eval_max_tokens``.
        streams: the validation tokens among them.
        teacher: None where there is none.
        precision: device and compute types.
        processes: this process among those of the run; alone by default.
        stopping: whether this process was asked to stop; called before every batch.
        stored: the teacher's losses by context, in nats, in place of a teacher.
    """

    def __init__(
        self,
        config: TrainConfig,
        streams: TokenStreams,
        teacher: Teacher | None,
        precision: Precision,
        processes: Processes | None = None,
        stopping: Callable[[], bool] | None = None,
        stored: Mapping[int, float] | None = None,
    ) -> None:
        self.processes = processes or Processes(device=precision.device)
        self.config = config
        self.streams = streams
        self.teacher = teacher
        self.precision = precision
        self.stopping = stopping
        self.stored = stored
        # Head and loss; compiling the student's body costs more time than it saves, see
        # bench/README.md
        self._compiled = precision.compiles(config)
        self.tokens: dict[int, int] = {}
        """By context: how many tokens its losses are the means over."""
        self._teacher_losses: dict[tuple[int, int], float] = {}
        """By context and vocabulary size; NaN past the teacher's longest context."""
        self._told: set[int] = set()
        """Contexts at which no loss is stored, as the log says."""

    def metrics(self, student: Student, trained_positions: int) -> dict[str, float]:
        """``val_loss_student@512``, ``val_ppl_student@512``, ``val_loss_teacher@512``, …

        The same names without ``@…`` hold the values at the training context.

        Raises:
            EvaluationStopped: one of the processes was asked to stop; every process raises it.
        """
        metrics: dict[str, float] = {}
        for context in self.config.contexts:
            losses = {"student": self.student_loss(student, context, trained_positions)}
            teacher_loss = self.teacher_loss(context, student.config.vocab_size)
            if teacher_loss is not None:
                losses["teacher"] = teacher_loss
            for who, loss in losses.items():
                values = {f"val_loss_{who}": loss, f"val_ppl_{who}": perplexity(loss)}
                metrics |= {f"{name}@{context}": value for name, value in values.items()}
                if context == self.config.block_size:
                    metrics |= values
        return metrics

    def student_loss(
        self, student: Student, context: int, trained_positions: int, *, raw: bool = False
    ) -> float:
        """Mean loss in nats at a context.

        Past the trained positions, a table stretched by `resize_positions` stands in for the
        student's, unless ``raw``; the weights stay as they are.
        """
        table = None
        if student.pos is not None and context > trained_positions and not raw:
            table = resize_positions(
                full_tensor(student.pos.weight.detach()),
                trained_positions,
                context,
                self.config.pos_resize,
            )
        was_training = student.training
        student.eval()
        try:
            with self.precision.autocast():
                head = full_tensor(student.lm_head.weight.detach())
                return self._mean_loss(context, lambda ids: student(ids, table), head, None)
        finally:
            student.train(was_training)
            if is_sharded_module(student):
                student.reshard()

    def teacher_loss(self, context: int, vocab_size: int) -> float | None:
        """Mean loss in nats at a context; None without a teacher, or past its longest context.

        Args:
            context: in tokens.
            vocab_size: of the student; the teacher's logits past it are padding and left out.
        """
        teacher, key = self.teacher, (context, vocab_size)
        if self.stored is not None:
            return self._stored_loss(self.stored, context)
        if teacher is None:
            return None
        if key not in self._teacher_losses:
            longest = teacher.spec.max_context
            if longest is not None and context > longest:
                log.info(
                    "context %d is past the teacher's %d positions: student only", context, longest
                )
                self._teacher_losses[key] = math.nan
            else:
                bias = None if teacher.bias is None else teacher.bias[:vocab_size]
                self._teacher_losses[key] = self._mean_loss(
                    context, teacher.hidden, teacher.head[:vocab_size], bias
                )
        loss = self._teacher_losses[key]
        return None if math.isnan(loss) else loss

    def _stored_loss(self, stored: Mapping[int, float], context: int) -> float | None:
        if context not in stored and context not in self._told:
            self._told.add(context)
            log.info("the targets have no losses of the teacher at context %d", context)
        return stored.get(context)

    @torch.no_grad()
    def _mean_loss(
        self,
        context: int,
        hidden: Callable[[Tensor], Tensor],
        head: Tensor,
        bias: Tensor | None,
    ) -> float:
        """Token-weighted mean cross entropy in nats over the batches of all processes.

        Args:
            context: in tokens.
            hidden: ``[B, L]`` token ids to the last hidden state ``[B, L, D]``.
            head: ``[V, D]``.
            bias: ``[V]`` or None.

        Raises:
            EvaluationStopped: one of the processes was asked to stop; every process raises it.
        """
        device = self.processes.device
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for inputs, labels in evaluation_batches(
            self.streams.validation,
            context=context,
            batch=max(1, self.config.micro_batch * self.config.context // context),
            max_tokens=self.config.eval_max_tokens,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
        ):
            # Every process has the same number of batches, so all take part in each exchange
            if self.stopping is not None and self.processes.any(self.stopping()):
                raise EvaluationStopped
            total[1] += int((labels != IGNORED).sum())
            states = hidden(inputs.to(device, non_blocking=True)).flatten(0, 1)
            wanted = labels.flatten().to(device, non_blocking=True)
            total[0] += cross_entropy_sum(states, head, bias, wanted, compiled=self._compiled)
        loss, tokens = self.processes.sum(total).tolist()
        self.tokens[context] = int(tokens)
        return loss / tokens


def check_contexts(
    contexts: Iterable[int], trained_at: int, streams: TokenStreams, max_tokens: int
) -> None:
    """Refuse contexts longer than all that is evaluated.

    No token would have that many before it, so the loss would be that of a shorter context, and
    would only take more memory. The context trained at is allowed with a smaller split too.

    Args:
        contexts: to evaluate at, in tokens.
        trained_at: the longest context trained at, in tokens.
        streams: the validation tokens among them.
        max_tokens: ``eval_max_tokens``; 0 takes them all.

    Raises:
        UsageError: one is longer than the tokens that are evaluated.
    """
    tokens = len(streams.validation)
    for context in sorted(contexts):
        if context > max(trained_at, tokens):
            raise UsageError(
                f"--eval_ctx_lens={context} is longer than the validation split of {tokens} tokens;"
                " leave it out"
            )
        if 0 < max_tokens < context and context > trained_at:
            raise UsageError(
                f"--eval_ctx_lens={context} is longer than --eval_max_tokens={max_tokens};"
                " leave it out, or evaluate on more"
            )
