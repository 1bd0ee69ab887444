"""A record is whole after whatever ends its writer, and goes on without holes and repeats."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.metrics.test_reading_of_records import HEADER
from trainer.metrics.lines import CHECKPOINT, END, EVALUATION, METRICS, UPDATE, NewerMetricsError
from trainer.metrics.reading import RunRecord, read_run
from trainer.metrics.recording import Recorder
from trainer.runtime.errors import StorageError
from trainer.runtime.log import hide, set_up_logging
from trainer.storage.base import StorageConflictError
from trainer.storage.places import open_location
from trainer.storage.uploads import Write

Change = Callable[[Mapping[str, Any]], str]


@pytest.fixture(params=["local", "gs"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that does not exist yet."""
    if request.param == "local":
        return str(tmp_path / "run")
    return f"{request.getfixturevalue('gcs_bucket')}/run"


def own(header: Mapping[str, Any]) -> str:
    return ""


def started(
    uri: str, step: int = 0, *, of_another_run: Change = own, run: str = "a", **changed: Any
) -> Recorder:
    location = open_location(uri)
    location.list()
    recorder = Recorder(location)
    header = {name: value for name, value in HEADER.items() if name not in ("kind", "format")}
    header |= {"run": run} | changed
    recorder.begin(header, step, of_another_run, expected=step > 0)
    return recorder


def send(recorder: Recorder) -> None:
    def at_once(name: str, write: Write) -> None:
        assert write(name).name == METRICS

    recorder.send(at_once)


def trained(recorder: Recorder, first: int, last: int) -> None:
    """Updates, and at every fourth step an evaluation and a checkpoint."""
    for step in range(first, last + 1):
        recorder.add(UPDATE, step, {"loss": 1.0 / step})
        if step % 4 == 0:
            tables = {"eval_tokens": {"32": 9}, "eval_tokens_of_split": {"32": 9}}
            recorder.add(EVALUATION, step, {**tables, "val_loss_student": 1.0 / step})
            made = {"best": False, "metric": "val_loss_student", "value": 1.0 / step}
            recorder.add(CHECKPOINT, step, {"name": f"ckpt_step_{step}.pt", **made})


def steps(lines: list[dict[str, Any]]) -> list[int]:
    return [line["step"] for line in lines]


def assert_whole(record: RunRecord, last: int) -> None:
    assert steps(record.updates) == list(range(1, last + 1))
    assert steps(record.evaluations) == steps(record.checkpoints) == list(range(4, last + 1, 4))


def test_a_run_that_goes_on_drops_what_is_beyond_its_snapshot(uri: str) -> None:
    first = started(uri)
    send(first)
    assert read_run(uri).header["run"] == "a", "the header is there from the start"
    trained(first, 1, 11)
    send(first)
    for step in (8, 9, 4):
        again = started(uri, step, run="b")
        trained(again, step + 1, 11)
        send(again)
    record = read_run(uri)
    assert record.header["run"] == "a"
    assert_whole(record, 11)
    assert steps(record.starts) == [4], "of the others, which are beyond, nothing is left"


def test_what_is_made_anew_of_the_own_step_is_there_once(uri: str) -> None:
    """A kill between an evaluation and its snapshot; the run makes up for the evaluation."""
    first = started(uri)
    trained(first, 1, 8)
    first.add(END, 8, {"best_step": 8, "best_value": 0.125})
    send(first)
    again = started(uri, 8)
    trained(again, 8, 8)
    again.add(END, 8, {"best_step": 8, "best_value": 0.125})
    send(again)
    record = read_run(uri)
    assert_whole(record, 8)
    assert record.end is not None
    assert steps(record.starts) == [8]


def test_sending_without_new_lines_writes_nothing(uri: str) -> None:
    recorder = started(uri)
    trained(recorder, 1, 1)
    send(recorder)

    def never(name: str, write: Write) -> None:
        raise AssertionError("nothing is new")

    recorder.send(never)


def named_aside(uri: str) -> list[str]:
    return [e.name for e in open_location(uri).list() if e.name.startswith("metrics-before-")]


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_last_line_keeps_no_run_from_going_on(uri: str, cut: int) -> None:
    first = started(uri)
    trained(first, 1, 6)
    send(first)
    location = open_location(uri)
    whole = location.read_bytes(METRICS, limit=1 << 20)
    location.put_bytes(whole[:-cut], METRICS)
    again = started(uri, 4)
    trained(again, 5, 8)
    send(again)
    assert_whole(read_run(uri), 8)
    assert not named_aside(uri)


@pytest.mark.parametrize("kind", ["damaged", "foreign"])
def test_what_is_no_record_of_this_run_is_kept_and_another_begun(
    uri: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging()
    first = started(uri)
    trained(first, 1, 6)
    send(first)
    location = open_location(uri)
    before = location.read_bytes(METRICS, limit=1 << 20)
    if kind == "damaged":
        before = before.replace(b"update", b"\0\0\0\0", 2)
        location.put_bytes(before, METRICS)
    again = started(uri, 4, of_another_run=lambda _: "seed 1 -> 2" if kind == "foreign" else "")
    trained(again, 5, 8)
    send(again)
    record = read_run(uri)
    assert steps(record.updates) == [5, 6, 7, 8]
    (aside,) = named_aside(uri)
    assert open_location(uri).read_bytes(aside, limit=1 << 20) == before
    errors = capsys.readouterr().err
    reason = {"damaged": "it is not JSON", "foreign": "seed 1 -> 2"}
    (line,) = [line for line in errors.splitlines() if "it is kept as" in line]
    assert reason[kind] in line
    assert f"there is no {uri}/metrics.jsonl of this run yet: it begins at step 4" in errors


def test_a_file_larger_than_any_record_is_kept_too(tmp_path: Path) -> None:
    size = (1 << 29) + 1
    with open(tmp_path / METRICS, "wb") as file:
        file.truncate(size)
    trained(started(str(tmp_path)), 1, 4)
    assert_whole(read_run(str(tmp_path)), 4)
    (aside,) = named_aside(str(tmp_path))
    assert (tmp_path / aside).stat().st_size == size


def test_a_run_that_never_trained_leaves_nothing_to_keep(uri: str) -> None:
    send(started(uri))
    send(started(uri, of_another_run=lambda _: "seed 1 -> 2", run="b"))
    assert read_run(uri).header["run"] == "b"
    assert not named_aside(uri)


def test_a_record_of_a_newer_format_is_left_alone(uri: str) -> None:
    first = started(uri)
    trained(first, 1, 2)
    send(first)
    location = open_location(uri)
    newer = location.read_bytes(METRICS, limit=1 << 20).replace(b'"format": 1', b'"format": 2')
    location.put_bytes(newer, METRICS)
    with pytest.raises(NewerMetricsError, match="line 1: it is of format 2, .* update the program"):
        started(uri, 2)
    assert open_location(uri).read_bytes(METRICS, limit=1 << 20) == newer


def test_what_cannot_be_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with pytest.raises(StorageError, match=f"{METRICS}.*directory"):
        started(str(tmp_path))
    (tmp_path / METRICS).rmdir()
    os.mkfifo(tmp_path / METRICS)
    with pytest.raises(StorageError, match=f"{METRICS}.*pipe"):
        started(str(tmp_path))
    assert stat.S_ISFIFO((tmp_path / METRICS).stat().st_mode)


def test_the_header_hides_secrets(uri: str) -> None:
    hide("hush-hush")
    send(started(uri, tokens={"dataset": "https://ada:hush-hush@host/data"}))
    assert read_run(uri).header["tokens"] == {"dataset": "https://***@host/data"}


def test_a_job_that_has_lost_the_location_writes_to_no_record_of_the_other(uri: str) -> None:
    first = started(uri)
    trained(first, 1, 4)
    send(first)
    location = open_location(uri)
    location.list()
    location.claim()
    second = Recorder(location)
    header = {name: value for name, value in HEADER.items() if name not in ("kind", "format")}
    second.begin(header, 4, own, expected=True)
    send(second)
    trained(first, 5, 6)
    if uri.startswith("gs://"):
        with pytest.raises(StorageConflictError, match="written by another job"):
            send(first)
    else:
        send(first)  # to a file that has no name any more
    trained(second, 5, 5)
    send(second)
    record = read_run(uri)
    assert_whole(record, 5)
    assert steps(record.starts) == [4]


def test_a_file_that_is_gone_is_written_again_whole(tmp_path: Path) -> None:
    recorder = started(str(tmp_path))
    trained(recorder, 1, 3)
    (tmp_path / METRICS).unlink()
    trained(recorder, 4, 5)
    send(recorder)
    trained(recorder, 6, 6)
    assert_whole(read_run(str(tmp_path)), 6)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file of this process can have more bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_line_that_finds_no_room_leaves_no_part_of_it(tmp_path: Path) -> None:
    recorder = started(str(tmp_path))
    trained(recorder, 1, 3)
    path = tmp_path / METRICS
    before = path.read_bytes()
    with room_for(len(before) + 10):
        with pytest.raises(StorageError, match=METRICS):
            recorder.add(UPDATE, 4, {"loss": 0.25})
        assert path.read_bytes() == before
        with pytest.raises(StorageError, match=METRICS):
            send(recorder)  # no snapshot is to come before that line
    recorder.add(UPDATE, 5, {"loss": 0.2})
    assert steps([json.loads(line) for line in path.read_text().splitlines()[1:]]) == [
        1,
        2,
        3,
        4,
        5,
    ]
