"""Failures that a command reports in one line, each with an exit status."""

from __future__ import annotations

import signal


def signal_status(number: int) -> int:
    """The exit status of a process that a signal ended, by the shell's convention."""
    return 128 + number


class LiquidError(Exception):
    """A failure with a message for the user; ends a command with status 1."""

    exit_status = 1


class UsageError(LiquidError):
    """Settings or arguments that cannot work; ends a command with status 2."""

    exit_status = 2


class DataError(LiquidError):
    """A data set or a prepared token stream that cannot be used."""


class ModelError(LiquidError):
    """A teacher or a student that cannot be loaded, or that do not fit together."""


class CheckpointError(LiquidError):
    """A checkpoint that is missing, damaged, hostile or of another shape."""


class MetricsError(LiquidError):
    """A run's ``metrics.jsonl`` that is missing, damaged, hostile or of another run."""


class StorageError(LiquidError):
    """A file or object that cannot be read or written."""


class DeviceError(LiquidError):
    """A machine without the GPUs that were asked for."""


class TrainingError(LiquidError):
    """Training that cannot go on, for example after repeated non-finite gradients."""


class Preempted(LiquidError):
    """A signal stopped the run after its state was saved; the platform should start it again."""

    def __init__(self, message: str, signal_name: str = "SIGTERM") -> None:
        super().__init__(message)
        self.exit_status = signal_status(signal.Signals[signal_name])
