"""One update on the device: teacher, student, loss, gradients and AdamW."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.loss import fused as fused_loss
from trainer.loss.chunked import DistillLoss, Mix, distill_loss
from trainer.loss.sparse import SparseTargets, sparse_distill_loss
from trainer.models.student import Student
from trainer.models.teacher import Teacher
from trainer.runtime.processes import Processes
from trainer.runtime.sharding import full_tensor, is_sharded_module, local_tensor, wrap
from trainer.settings.config import TrainConfig
from trainer.targets.records import Layout
from trainer.training.feed import Feed
from trainer.training.optimizer import build_optimizer, load_state_by_name, parameter_names
from trainer.training.precision import Precision


class StudentWithLoss(nn.Module):
    """Student and loss in one forward pass, so that DDP and FSDP see every use of a parameter."""

    def __init__(self, student: Student, teacher: Teacher | None, precision: Precision) -> None:
        super().__init__()
        self.student = student
        self.body: Any = student
        # In a list, so that it is no submodule: it is frozen, and neither sharded nor saved here
        self._teacher = [teacher]
        self.precision = precision

    def forward(
        self,
        inputs: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        targets: SparseTargets | None,
        mix: Mix,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, CE and divergence of ``[B, L]`` inputs and labels; see `DistillLoss`.

        The divergence is from targets where there are any, else from the teacher.
        """
        (teacher,) = self._teacher
        with self.precision.autocast():
            hidden = self.body(inputs).flatten(0, 1).to(self.precision.compute)
        head = self.student.lm_head.weight
        teacher_head = None if teacher is None else teacher.head
        if teacher_hidden is not None:
            teacher_hidden = teacher_hidden.flatten(0, 1)
        fused = fused_loss.usable(hidden, head, teacher_hidden, teacher_head, mix)
        if targets is not None:
            sparse_loss = fused_loss.sparse_distill_loss if fused else sparse_distill_loss
            return sparse_loss(hidden, head, targets, labels.flatten(), mix)
        loss = fused_loss.distill_loss if fused else distill_loss
        return loss(
            hidden,
            head,
            teacher_hidden,
            teacher_head,
            labels.flatten(),
            mix,
            teacher_bias=None if teacher is None else teacher.bias,
        )


class TrainStep:
    """Micro-batches in, updated weights out.

    The host waits for the device only to learn whether the update before the last one was skipped;
    see `outcomes`.

    Args:
        config: with ``grad_accum`` resolved.
        student: in fp32; moved to the device.
        teacher: None where no update has alpha above 0.
        precision: device and compute types.
        processes: this process among the others.
        moments: AdamW state by parameter name to start from; empty for a fresh one.
        layout: of the records that come in place of a teacher.
    """

    def __init__(
        self,
        config: TrainConfig,
        student: Student,
        teacher: Teacher | None,
        precision: Precision,
        processes: Processes,
        moments: Mapping[str, Mapping[str, Any]],
        layout: Layout | None = None,
    ) -> None:
        self.config = config
        self.feed = Feed(teacher, precision.device, layout)
        self.precision = precision
        self.student = student.to(precision.device).train()
        module = StudentWithLoss(self.student, teacher, precision)
        if config.activation_checkpointing:
            self.student.checkpoint_activations = True
        self.sharded = config.parallel == "fsdp" and processes.world_size > 1
        """Whether weights and moments are spread over processes."""
        if precision.compiles(config):
            if self.sharded:
                for block in self.student.blocks:
                    block.compile(dynamic=False)
            else:
                module.body = torch.compile(self.student, dynamic=False)
        self.module = wrap(module, processes, config.parallel)
        self.optimizer = build_optimizer(self.student, config)
        if moments:
            load_state_by_name(self.optimizer, self.student, moments)
        self.parameter_names = parameter_names(self.optimizer, self.student)
        """In the order of AdamW's state."""
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.loss_scaling)
        self._norms: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()

    def micro_step(
        self,
        inputs: Tensor,
        labels: Tensor,
        mix: Mix,
        *,
        records: Tensor | None = None,
        accumulation: int,
        last: bool,
    ) -> DistillLoss:
        """Forward and backward of one micro-batch ``[B, L]``; gradients add up until `update`.

        Args:
            inputs: token ids; from pinned memory the teacher runs ahead, see `Feed`.
            labels: the next token ids, in the same kind of memory.
            mix: alpha, T and divergence.
            records: ``[B, L, record_bytes]``, likewise, where there is a layout.
            accumulation: micro-batches of this update.
            last: whether this is the update's last one, in which processes exchange gradients.
        """
        batch = self.feed.place(inputs, labels, mix, records)
        with self._exchange(last):
            output = DistillLoss(*self.module(*batch, mix))
            self.scaler.scale(output.loss / accumulation).backward()
        return output

    def _exchange(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let processes exchange gradients in the last micro-batch only."""
        if isinstance(self.module, nn.parallel.DistributedDataParallel) and not last:
            return self.module.no_sync()
        if is_sharded_module(self.student):
            self.student.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def update(self, learning_rate: float) -> Tensor:
        """Clip the gradient, and update if it is finite; returns its norm, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.optimizer.param_groups[0]["fused"] and not self.precision.loss_scaling:
            norm = self._fused_update()
        else:
            self.scaler.unscale_(self.optimizer)
            norm = full_tensor(
                torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.config.grad_clip)
            )
            if bool(torch.isfinite(norm)):
                self.scaler.step(self.optimizer)
            self.scaler.update()
            self._norms.append((norm.detach().cpu(), None))
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _fused_update(self) -> Tensor:
        """Let AdamW's kernel clip, and skip the update, without the host knowing which."""
        gradients = [p.grad for p in self.student.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        optimizer: Any = self.optimizer
        # Fused AdamW divides the gradients by grad_scale and skips the step if found_inf is 1
        optimizer.grad_scale = (norm / self.config.grad_clip).clamp(min=1.0)
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        copy = torch.empty((), dtype=norm.dtype, pin_memory=True)
        copy.copy_(norm.detach(), non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._norms.append((copy, event))
        return norm

    def weights_are_finite(self) -> bool:
        """Whether this process's part of the weights is finite; waits for the device."""
        parts = [local_tensor(parameter.detach()) for parameter in self.student.parameters()]
        return bool(torch.stack([torch.isfinite(part).all() for part in parts]).all())

    def outcomes(self, *, wait: bool) -> Iterable[bool]:
        """For each update that no call has yielded yet, in order: whether its gradient was finite.

        Args:
            wait: yield all; else a GPU's newest, for which the host would wait, is left for later.
        """
        left = 0 if wait or not self._norms or self._norms[-1][1] is None else 1
        while len(self._norms) > left:
            norm, event = self._norms.popleft()
            if event is not None:
                event.synchronize()
            yield bool(torch.isfinite(norm))
