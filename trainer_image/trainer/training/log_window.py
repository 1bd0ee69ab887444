"""Means and speed between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from trainer.loss.chunked import DistillLoss
from trainer.runtime.processes import Processes


class LogWindow:
    """Sums since the last log line, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        # Sums of loss, CE, KD (by micro-batch) and gradient norm; how many of each were finite
        self.sums = torch.zeros(2, 4, device=self.device)
        self.updates = self.untimed = 0
        self.began = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block, such as an evaluation or the copy of a snapshot."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.began += time.perf_counter() - started

    def seconds(self) -> float:
        """Time spent training since the last log line."""
        return time.perf_counter() - self.began

    def leave_out_updates(self) -> None:
        """Leave the time and the updates so far out of the speed, as they were not typical."""
        self.began, self.untimed = time.perf_counter(), self.updates

    def add(self, output: DistillLoss) -> None:
        """Count a micro-batch; values not computed or not finite (NaN, infinity) are left out."""
        self._add(slice(0, 3), torch.stack((output.loss.detach(), output.ce, output.kd)))

    def add_norm(self, norm: Tensor) -> None:
        """Count an update; the norm of a skipped one, which is not finite, is left out."""
        self._add(slice(3, 4), norm)
        self.updates += 1

    def _add(self, part: slice, values: Tensor) -> None:
        self.sums[0, part] += torch.nan_to_num(values.float(), nan=0.0, posinf=0.0, neginf=0.0)
        self.sums[1, part] += torch.isfinite(values)

    def means(self, processes: Processes) -> dict[str, float]:
        """Loss, CE and KD per token in nats and gradient norm; those never finite are left out."""
        sums, counts = processes.sum(self.sums).tolist()
        names = ("loss", "ce", "kd", "grad_norm")
        totals = zip(names, sums, counts, strict=True)
        return {name: total / count for name, total, count in totals if count}
