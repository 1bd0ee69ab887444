from __future__ import annotations

import json

import pytest

from trainer import pick_best
from trainer.runtime.commands import run_command
from trainer.runtime.log import set_up_logging


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: DIR_OR_URI (see --help)"),
        (["run", "--metrik=loss"], "unknown flag --metrik; did you mean --metric? (see --help)"),
        (["run", "--metric"], "argument --metric: expected one argument (see --help)"),
        (["s3://run"], "'s3://run' is neither gs://bucket/path nor a local path"),
    ],
)
def test_usage_errors_are_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up_logging()
    assert run_command(pick_best.main, argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == message
