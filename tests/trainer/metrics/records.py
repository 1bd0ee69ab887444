"""What of a run's record must be the same however often the run was stopped."""

from __future__ import annotations

import json
from typing import Any

from trainer.metrics.lines import FILE_LIMIT, METRICS
from trainer.metrics.reading import read_run
from trainer.storage.places import open_location

_OF_A_START = ("tokens_per_second", "memory_gib", "time", "started", "machine", "run")


def lasting_lines(uri: str) -> list[dict[str, Any]]:
    """The lines of a record without its starts, times, speeds and machines; read strictly first."""
    read_run(uri)
    data = open_location(uri).read_bytes(METRICS, limit=FILE_LIMIT)
    assert data.endswith(b"\n")
    lines = [json.loads(line) for line in data.splitlines()]
    kept = [
        {
            name: value
            for name, value in line.items()
            if name not in _OF_A_START and not name.endswith("seconds")
        }
        for line in lines
        if line["kind"] != "start"
    ]
    for name in ("local_workdir", "output_gcs_uri", "resume_gcs_uri"):
        del kept[0]["settings"][name]
    return kept
