"""A run's record read back from its output location.

record = read_run("gs://BUCKET/run")
losses = [update["loss"] for update in record.updates]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.metrics.lines import (
    CHECKPOINT,
    END,
    EVALUATION,
    FILE_LIMIT,
    METRICS,
    START,
    UPDATE,
    parse,
)
from trainer.runtime.errors import MetricsError
from trainer.storage.base import StorageMissingError
from trainer.storage.files import in_home
from trainer.storage.places import check_scheme, is_remote, read_bytes


@dataclass(frozen=True)
class RunRecord:
    """What a run has recorded: the fields of its lines, in the order of their steps.

    Measured numbers that were not finite are NaN.
    """

    uri: str
    """Of the file."""
    header: dict[str, Any]
    starts: list[dict[str, Any]]
    """Of the starts after the first."""
    updates: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]]
    end: dict[str, Any] | None
    """None where the run has not come to its end."""


def read_run(location: str) -> RunRecord:
    """The record of a run, which may still be going on; a torn last line is dropped.

    Args:
        location: the run's output, a local directory or ``gs://`` prefix; or the file itself.

    Raises:
        MetricsError: there is none, or it is damaged or of a newer format; names file and line.
        StorageError: it cannot be read, or is larger than any run's.
        UsageError: the URI has another scheme or is malformed.
    """
    uri = _file_of(location)
    try:
        data = read_bytes(uri, limit=FILE_LIMIT)
    except StorageMissingError:
        raise MetricsError(
            f"there is no {uri}: no run has recorded its metrics there; give a run's output"
            " location"
        ) from None
    lines = parse(data, uri)
    if not lines:
        raise MetricsError(f"{uri} has no whole line yet; wait for the run to begin")
    header, *others = lines

    def of(kind: str) -> list[dict[str, Any]]:
        return [line.fields for line in others if line.kind == kind]

    return RunRecord(
        uri,
        header.fields,
        starts=of(START),
        updates=of(UPDATE),
        evaluations=of(EVALUATION),
        checkpoints=of(CHECKPOINT),
        end=next(iter(of(END)), None),
    )


def _file_of(location: str) -> str:
    check_scheme(location)
    inside = f"{location.rstrip('/')}/{METRICS}"
    if is_remote(location):
        return location if location.endswith(".jsonl") else inside
    path = Path(in_home(location))
    if path.is_dir() or not (path.exists() or path.suffix == ".jsonl"):
        return str(path / METRICS)
    return str(path)
