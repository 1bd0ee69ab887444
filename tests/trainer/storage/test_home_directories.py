"""``~`` and ``~NAME`` in every path that a user gives."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.samples import save_student
from trainer import (
    entrypoint,
    evaluate,
    export_hf,
    lm_eval_tasks,
    pick_best,
    prepare_tokens,
    resize_reset,
    sample,
)
from trainer.runtime.commands import run_command
from trainer.runtime.errors import StorageError, UsageError
from trainer.storage.files import in_home
from trainer.storage.places import check_output, check_output_file

NOWHERE = "~nobody-of-that-name/x"

Settings = dict[str, Any]


def given(settings: Settings, *names: str) -> list[str]:
    return [f"--{name}={settings[name]}" for name in names]


CASES: dict[str, Callable[[Settings, str], list[str]]] = {
    **{
        name: lambda settings, path, name=name: given(settings | {name: path}, *settings, name)
        for name in (
            *("teacher_name", "dataset_name", "resume_gcs_uri", "output_gcs_uri", "local_workdir"),
            *("cache_dir", "tokens_dir", "hf_token_file", "hf_token_gcs_uri", "config"),
        )
    },
    "prepare_tokens": lambda settings, path: [
        *(path, *given(settings, "teacher_name", "dataset_name"))
    ],
    "evaluate of": lambda settings, path: [
        "metrics",
        path,
        *given(settings, "teacher_name", "dataset_name"),
    ],
    "evaluate to": lambda settings, path: [
        path,
        "best.pt",
        *given(settings, "teacher_name", "dataset_name"),
    ],
    "export_hf of": lambda settings, path: [path, "exported"],
    "export_hf to": lambda settings, path: ["best.pt", path],
    "export_hf with": lambda settings, path: ["best.pt", "exported", f"--tokenizer={path}"],
    "sample of": lambda settings, path: [path, "--prompt=a"],
    "sample with": lambda settings, path: ["best.pt", f"--prompt_file={path}"],
    "lm_eval_tasks to": lambda settings, path: ["exported", path, "--tasks=a"],
    "resize_reset of": lambda settings, path: [path, "r.pt", "--block_size=64"],
    "resize_reset to": lambda settings, path: ["best.pt", path, "--block_size=64"],
    "pick_best": lambda settings, path: [path],
}

DOORS = {
    "prepare_tokens": prepare_tokens,
    "evaluate": evaluate,
    "export_hf": export_hf,
    "sample": sample,
    "lm_eval_tasks": lm_eval_tasks,
    "resize_reset": resize_reset,
    "pick_best": pick_best,
}


@pytest.mark.parametrize("case", CASES)
def test_a_home_directory_that_there_is_not(
    case: str,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    save_student(tmp_path / "best.pt")
    settings = settings | {"cache_dir": str(tmp_path / "cache")}
    before = sorted(os.listdir())
    argv = CASES[case](settings, NOWHERE)
    if case.startswith("evaluate"):
        argv.append("--eval_ctx_lens=16")
    door: Any = DOORS.get(case.partition(" ")[0], entrypoint)
    assert run_command(door.main, argv) == 2
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    (error,) = [line["message"] for line in lines if line["severity"] == "ERROR"]
    assert NOWHERE.partition("/")[0] in error
    assert "there is no such home directory; write the path out" in error
    assert set(os.listdir()) - set(before) <= {"work"}, "nothing is made of that name"


def test_home_is_where_things_are_written_and_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert in_home("~/x") == str(tmp_path / "x")
    assert in_home("a/~/x") == "a/~/x"
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UsageError, match="is a directory; give the path of the file"):
        check_output_file("~/directory")
    with pytest.raises(StorageError, match=f"{tmp_path}/file.* failed: a file is in the way"):
        check_output("~/file/run")
    with pytest.raises(UsageError, match="no such home directory"):
        in_home("~a\0b")
