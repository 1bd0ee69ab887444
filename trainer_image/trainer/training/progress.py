"""The state of a run beside weights and moments, and its result."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from trainer.runtime.errors import TrainingError
from trainer.settings.config import TrainConfig


@dataclass
class Progress:
    """The state of a run beside weights and moments (``trainer_state`` in checkpoints)."""

    best_value: float = math.inf
    best_step: int = -1
    skipped: int = 0
    """All updates skipped for a non-finite gradient."""
    skipped_in_row: int = 0
    metrics_step: int = -1
    """Updates done at the last evaluation; -1 before the first."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Of that evaluation."""
    first_step: int = -1
    """Updates done where this phase began; -1 in snapshots of older releases."""

    window: dict[str, Any] = field(default_factory=dict)
    """Since the last log line, as `LogWindow.state` gives it; empty in older snapshots."""

    @classmethod
    def load(cls, state: dict[str, Any]) -> Progress:
        """From ``trainer_state`` as `read_checkpoint` has checked it.

        Fields that it lacks get their defaults.
        """
        return cls(**{key: state[key] for key in cls.__dataclass_fields__ if key in state})


@dataclass
class RunResult:
    """How a run ended."""

    step: int
    metrics: dict[str, float]
    best_value: float
    best_step: int

    def checked(self, config: TrainConfig) -> RunResult:
        """Itself.

        Raises:
            TrainingError: no evaluation was finite, so there is no best checkpoint.
        """
        if self.best_step < 0:
            raise TrainingError(
                f"no evaluation up to step {self.step} gave a finite {config.save_best_on}, so"
                f" {config.uri} has no best checkpoint; give a smaller --lr_peak than"
                f" {config.peak_lr:g}, or check the data"
            )
        return self
