"""Means and speed between two log lines."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.loss.chunked import DistillLoss
from trainer.runtime.processes import Processes


class LogWindow:
    """Sums since the last log line, kept on the device so that no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._seconds = 0.0
        """Trained for before this window began, and what was left out of its time."""
        self.began = time.perf_counter()
        self.clear()

    def clear(self) -> None:
        """Start a new window."""
        # Sums of loss, CE, KD (by micro-batch) and gradient norm; how many of each were finite
        self.sums = torch.zeros(2, 4, device=self.device)
        self._unfinished = torch.zeros(2, 4, device=self.device)
        """The same of an update that is not complete."""
        self.updates = 0
        self.leave_out_updates()

    def state(self, processes: Processes) -> dict[str, Any]:
        """What a snapshot needs so that a run that goes on has the same means in its next line.

        Every one of the processes takes part.
        """
        sums = processes.gather(self.sums).tolist()
        return {"seconds": self.trained_seconds(), "updates": self.updates, "sums": sums}

    def restore(self, state: Mapping[str, Any], processes: Processes) -> None:
        """Go on with a window of a snapshot; an empty state, of an older one, leaves a new one.

        With another number of processes the main one takes all of the sums.
        """
        if not state:
            return
        sums = torch.tensor(state["sums"], device=self.device)
        if len(sums) == processes.world_size:
            self.sums = sums[processes.rank].clone()
        elif processes.main:
            self.sums = sums.sum(0)
        self.updates = state["updates"]
        self.leave_out_updates()
        self._seconds = state["seconds"]

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

    def trained_seconds(self) -> float:
        """Time spent training since the run began, over all of its starts."""
        return self._seconds + self.seconds()

    def leave_out_updates(self) -> None:
        """Leave the time and the updates so far out of the speed, as they were not typical."""
        self._seconds = self.trained_seconds()
        self.began, self.untimed = time.perf_counter(), self.updates

    def add(self, output: DistillLoss) -> None:
        """Count a micro-batch; values not computed or not finite (NaN, infinity) are left out.

        It is among the means once its update is.
        """
        self._add(slice(0, 3), torch.stack((output.loss.detach(), output.ce, output.kd)))

    def add_norm(self, norm: Tensor) -> None:
        """Count an update; the norm of a skipped one, which is not finite, is left out."""
        self._add(slice(3, 4), norm)
        self.sums += self._unfinished
        self._unfinished.zero_()
        self.updates += 1

    def _add(self, part: slice, values: Tensor) -> None:
        finite = torch.nan_to_num(values.float(), nan=0.0, posinf=0.0, neginf=0.0)
        self._unfinished[0, part] += finite
        self._unfinished[1, part] += torch.isfinite(values)

    def means(self, processes: Processes) -> dict[str, float]:
        """Loss, CE and KD per token in nats and gradient norm; those never finite are left out."""
        sums, counts = processes.sum(self.sums).tolist()
        names = ("loss", "ce", "kd", "grad_norm")
        totals = zip(names, sums, counts, strict=True)
        return {name: total / count for name, total, count in totals if count}
