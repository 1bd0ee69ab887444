"""Names and directories of local runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pipelines.local_runs import name_of_run, open_run
from trainer.runtime.errors import UsageError


def test_a_name_says_when_and_with_what() -> None:
    name = name_of_run({"continue_train_steps": 160, "teacher_name": "/a b/c"})
    assert re.fullmatch(r"\d{8}-\d{6}-continue_train_steps=160-teacher_name=_a_b_c", name)
    assert re.fullmatch(r"\d{8}-\d{6}", name_of_run({}))
    assert name_of_run({"seed": 7, "more": {"x" * 500: 1}}).endswith("-seed=7-more")


def test_runs_of_one_second_have_directories_of_their_own(tmp_path: Path) -> None:
    names = [open_run(tmp_path, {"seed": i}, "c", name="now").name for i in range(3)]
    assert names == ["now", "now-2", "now-3"]
    described = json.loads((tmp_path / "runs" / "now-3" / "parameters.json").read_text())
    assert described["parameters"] == {"seed": 2}
    assert described["code"] == "c"


def test_a_named_run_goes_on_with_its_own_parameters_alone(tmp_path: Path) -> None:
    first = open_run(tmp_path, {"seed": 1, "more": {"a": 1}}, "c", given="mine")
    assert open_run(tmp_path, {"seed": 1, "more": {"a": 1}}, "c", given="mine") == first
    with pytest.raises(UsageError, match="RUN=mine is another run, with other seed, more; give"):
        open_run(tmp_path, {"seed": 2}, "c", given="mine")
    (tmp_path / "runs" / "other").mkdir()
    with pytest.raises(UsageError, match="RUN=other: .*other holds no run; give another name"):
        open_run(tmp_path, {}, "c", given="other")
    assert not list((tmp_path / "runs" / "other").iterdir())


@pytest.mark.parametrize("name", ["../x", "a b", "a/b", "-n", "x" * 101])
def test_names_that_are_no_directories(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give letters, digits"):
        open_run(tmp_path, {}, "c", given=name)
    assert not (tmp_path / "runs").exists()
