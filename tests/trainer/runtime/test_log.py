"""What the log's lines hold, and how a command ends."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.runtime import log
from trainer.runtime.errors import UsageError
from trainer.training.scalars import ScalarLog


def last_record(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    (line,) = capsys.readouterr().err.splitlines()
    return dict(json.loads(line, parse_constant=refuse))


def test_numbers_that_are_not_finite_are_standard_json(capsys: pytest.CaptureFixture[str]) -> None:
    log.set_up_logging()
    log.log_values("step 1: loss nan", loss=math.nan, nested={"x": [math.inf, 1.5]})
    record = last_record(capsys)
    assert record["message"] == "step 1: loss nan"
    assert record["loss"] is None
    assert record["nested"] == {"x": [None, 1.5]}


@pytest.mark.parametrize(
    ("given", "form"),
    [
        ({}, log.TEXT),
        ({"AIP_MODEL_DIR": "gs://b/m"}, log.JSON),
        ({"CLOUD_ML_JOB_ID": "1"}, log.JSON),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, log.JSON),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", log.FORMAT: "text"}, log.TEXT),
        ({log.FORMAT: "json"}, log.JSON),
        ({log.FORMAT: "", "KFP_POD": "x"}, log.TEXT),
    ],
)
def test_lines_are_json_where_asked_for_or_collected(given: dict[str, str], form: str) -> None:
    """Of a process whose output goes into a pipe."""
    code = "from trainer.runtime import log; log.set_up_logging(); log.log.warning('said')"
    kept = {name: value for name, value in os.environ.items() if name == "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=kept | given, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith(" WARNING said") == (form == log.TEXT)
    assert line.startswith("{") == (form == log.JSON)


def test_a_terminal_gets_text_wherever_it_is() -> None:
    ours, theirs = os.openpty()
    kept = os.dup(2)
    os.dup2(theirs, 2)
    try:
        assert log.log_format({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}) == log.TEXT
        assert log.log_format({log.FORMAT: "json"}) == log.JSON
    finally:
        os.dup2(kept, 2)
        for number in (ours, theirs, kept):
            os.close(number)


def test_another_form_of_lines_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(log.FORMAT, "xml")
    with pytest.raises(UsageError, match="LOG_FORMAT='xml': choose one of json, text"):
        log.set_up_logging()
    log.log.handlers.clear()
    assert log.report_failure(UsageError("reported")) == 2
    assert capsys.readouterr().err.endswith("ERROR reported\n")


def test_no_password_of_an_address_is_shown() -> None:
    hidden = {
        "'https://me:secret@host/x' is": "'https://***@host/x' is",
        "http://token@host": "http://***@host",
        "https://host/a@b and gs://b/x@1": "https://host/a@b and gs://b/x@1",
    }
    for text, shown in hidden.items():
        assert log.without_secrets(text) == shown


def failure_of(path: Path) -> OSError:
    with pytest.raises(NotADirectoryError) as caught:
        path.mkdir()
    return caught.value


def test_failures_of_the_machine_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log.set_up_logging()
    (tmp_path / "file").write_text("x")
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(1 << 60)
    for error, message in (
        (failure_of(tmp_path / "file" / "x"), f"{str(tmp_path / 'file' / 'x')!r}: Not a directory"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (too_large.value, "out of memory: "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "smaller --micro"),
        (MemoryError(), "out of memory"),
    ):
        assert log.report_failure(error) == 1
        assert message in str(last_record(capsys)["message"])
    assert log.report_failure(UsageError("--x=1\nis wrong")) == 2
    assert last_record(capsys)["message"] == "--x=1 is wrong"
    assert log.report_failure(KeyError("ours")) == 1
    assert last_record(capsys)["message"] == "unexpected failure: KeyError: 'ours'"


def test_scalars_after_the_step_that_a_run_goes_on_from_are_hidden(tmp_path: Path) -> None:
    first = ScalarLog(str(tmp_path))
    for step in range(1, 6):
        first.add({"train/loss": 10.0 + step}, step)
    first.close()
    time.sleep(1.1)  # TensorBoard orders files by the second in their names
    again = ScalarLog(str(tmp_path), step=3)
    for step in range(4, 7):
        again.add({"train/loss": 20.0 + step}, step)
    again.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    points = [(event.step, event.value) for event in shown.Scalars("train/loss")]
    assert points == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 24.0), (5, 25.0), (6, 26.0)]
