"""The record of a run is read whole; whatever is wrong in it is one line that says where."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.metrics.lines import FILE_LIMIT, encode
from trainer.metrics.reading import read_run
from trainer.runtime.errors import LiquidError, MetricsError
from trainer.storage.places import open_location

HEADER: dict[str, Any] = {
    **{"kind": "header", "format": 1, "run": "gs://bucket/run", "started": "2026-01-02T03:04:05Z"},
    **{"settings": {"lr": {"value": 3e-4, "source": "default"}}, "code": {"version": "0.1.0"}},
    **{"libraries": {"torch": "2.11"}, "machine": {"host": "a"}, "student": {"parameters": 1}},
    **{"teacher": {"name": "gpt2"}, "tokens": {}, "phase": {"step": 0}},
}

CHECKPOINTS = {"kind": "checkpoint", "step": 4, "best": True, "metric": "val_loss_student"}

LINES: list[dict[str, Any]] = [
    HEADER,
    {"kind": "update", "step": 2, "tokens": 256, "loss": 3.5, "grad_norm": None},
    {"kind": "start", "step": 2, "time": "2026-01-02T04:04:05Z", "machine": {"host": "b"}},
    {"kind": "update", "step": 4, "tokens": 512, "loss": 3.25},
    {
        **{"kind": "evaluation", "step": 4, "eval_tokens": {"32": 96}},
        **{"eval_tokens_of_split": {"32": 128}, "val_loss_student@32": 3.0},
    },
    CHECKPOINTS | {"name": "ckpt_best_step4_vl3.0000.pt", "value": 3.0},
    CHECKPOINTS | {"name": "ckpt_step_4.pt", "best": False, "value": 3.0},
    {"kind": "end", "step": 4, "seconds": 1.5, "best_step": 4, "best_value": 3.0},
]


def as_bytes(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_bytes(as_bytes(LINES))
    return tmp_path / "run"


def test_a_record_is_read_by_its_directory_and_by_its_own_name(run: Path) -> None:
    record = read_run(str(run))
    assert record.header == HEADER
    assert [update["step"] for update in record.updates] == [2, 4]
    assert math.isnan(record.updates[0]["grad_norm"])
    assert record.starts == [LINES[2]]
    assert record.evaluations == [LINES[4]]
    assert record.checkpoints == LINES[5:7]
    assert record.end == LINES[7]
    assert read_run(f"{run}/").updates[1] == record.updates[1]
    os.rename(run / "metrics.jsonl", run / "other")
    assert read_run(str(run / "other")).end == record.end


def test_a_record_in_a_bucket_is_read(gcs_bucket: str) -> None:
    open_location(f"{gcs_bucket}/run").put_bytes(as_bytes(LINES), "metrics.jsonl")
    for location in ("run", "run/", "run/metrics.jsonl"):
        assert read_run(f"{gcs_bucket}/{location}").updates[1]["loss"] == 3.25
    with pytest.raises(MetricsError, match=f"there is no {gcs_bucket}/none/metrics.jsonl: no run"):
        read_run(f"{gcs_bucket}/none")


@pytest.mark.parametrize("cut", [1, 20, 70])
def test_a_torn_last_line_is_dropped(run: Path, cut: int) -> None:
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    record = read_run(str(run))
    assert record.end is None
    assert len(record.checkpoints) == 2


def with_line(number: int, **changed: Any) -> bytes:
    lines = [*LINES]
    lines[number - 1] = lines[number - 1] | changed
    return as_bytes(lines)


BROKEN: dict[str, tuple[bytes, str]] = {
    "text": (as_bytes(LINES[:2]) + b"\0\0\0\n", ", line 3: it is not JSON"),
    "list": (b"[]\n", ", line 1: it is no table of named values"),
    "deep": (as_bytes(LINES[:1]) + b"[" * 100_000 + b"\n", ", line 2: it is not JSON"),
    "digits": (as_bytes(LINES[:1]) + b"9" * 10_000 + b"\n", ", line 2: it is not JSON"),
    "kind": (with_line(2, kind="upload"), ", line 2: there is no kind of line 'upload'"),
    "no kind": (with_line(2, kind=[]), r", line 2: there is no kind of line \[\]"),
    "step": (with_line(2, step=-1), ", line 2: its step is -1, not a whole number"),
    "flag": (with_line(2, step=True), ", line 2: its step is True, not a whole number"),
    "number": (with_line(4, loss="low"), ", line 4: its loss is 'low', not a number"),
    "large": (with_line(4, loss=1 << 80), ", line 4: its loss is 12.*, not a number"),
    "table": (with_line(5, eval_tokens=3), ", line 5: its eval_tokens is 3, not a table"),
    "best": (with_line(6, best=1), ", line 6: its best is 1, not true or false"),
    "lacking": (as_bytes([{"kind": "header", "format": 1}]), ", line 1: it has no 'settings'"),
    "newer": (with_line(1, format=2), ", line 1: it is of format 2, .* update the program"),
    "format": (with_line(1, format="1"), ", line 1: its format is '1', not a whole number"),
    "headless": (as_bytes(LINES[1:]), ", line 1: it is no header"),
    "two headers": (as_bytes([HEADER, HEADER]), ", line 2: it is a second header"),
    "back": (with_line(4, step=1), ", line 4: its step 1 is before the 2 of the line above"),
    "twice": (with_line(4, step=2), ", line 4: it is a second update of step 2"),
    "after": (as_bytes([*LINES, LINES[7]]), ", line 9: it comes after the end of the run"),
    "empty": (b"", " has no whole line yet"),
    "only torn": (as_bytes(LINES[:1])[:-1], " has no whole line yet"),
}


@pytest.mark.parametrize(("content", "expected"), BROKEN.values(), ids=BROKEN)
def test_anything_else_that_is_wrong_is_one_line_with_its_place(
    run: Path, content: bytes, expected: str
) -> None:
    (run / "metrics.jsonl").write_bytes(content)
    with pytest.raises(MetricsError, match=f"^{run}/metrics.jsonl{expected}") as caught:
        read_run(str(run))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_is_no_record_is_refused_without_reading_it(run: Path, tmp_path: Path) -> None:
    path = run / "metrics.jsonl"
    with open(path, "r+b") as file:
        file.truncate(10 << 30)
    with pytest.raises(LiquidError, match=f"{10 << 30} bytes; at most {FILE_LIMIT} are expected"):
        read_run(str(run))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(LiquidError, match="pipe"):
        read_run(str(run))
    path.unlink()
    path.mkdir()
    with pytest.raises(LiquidError, match="directory"):
        read_run(str(run))
    path.rmdir()
    for none in (run, run / "metrics.jsonl", tmp_path / "nowhere"):
        with pytest.raises(MetricsError, match="there is no .*metrics.jsonl: no run has recorded"):
            read_run(str(none))
    with pytest.raises(LiquidError, match="neither gs://"):
        read_run("s3://bucket/run")


def test_a_line_is_written_as_it_is_read(run: Path) -> None:
    line = encode("update", {"step": 6, "loss": math.nan, "ce": 0.1})
    assert line == b'{"kind": "update", "step": 6, "loss": null, "ce": 0.1}\n'
    path = run / "metrics.jsonl"
    path.write_bytes(as_bytes(LINES[:4]) + line)
    assert math.isnan(read_run(str(run)).updates[-1]["loss"])
