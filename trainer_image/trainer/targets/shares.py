"""How the making of targets is shared out among workers, as texts that go from task to task."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict

from trainer.runtime.strict_json import dumps
from trainer.settings.config import TargetSettings


def shares_of(
    *, context: int, temperatures: Iterable[float], target_bytes: int, workers: int
) -> list[str]:
    """For each worker its settings, as JSON.

    Args:
        context: of the teacher, in tokens.
        temperatures: that are trained at.
        target_bytes: of a token.
        workers: how many there are.

    Raises:
        UsageError: what would fail on every worker.
    """
    distinct = tuple(sorted(set(temperatures)))
    return [
        dumps(
            asdict(
                TargetSettings(
                    teacher_context=context,
                    target_temperatures=distinct,
                    target_bytes=target_bytes,
                    workers=workers,
                    worker=worker,
                )
            )
        )
        for worker in range(workers)
    ]
