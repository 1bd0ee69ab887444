"""SIGTERM to the first process of a container, which ignores what it has no handler for."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipelines.compile import compile_to
from pipelines.settings import load_settings

ROOT = Path(__file__).parents[2]
COMMANDS = [
    path
    for package in ("trainer_image/trainer", "pipelines")
    for path in sorted((ROOT / package).glob("*.py"))
    if "run_command(main)" in path.read_text(encoding="utf-8")
]
STAGES = [
    path
    for path in sorted((ROOT / "components").glob("*.py"))
    if "\n@dsl.component" in path.read_text(encoding="utf-8")
]

SLOW_START = """
import sys, time
print("at work", flush=True)
time.sleep(1)
"""
"""What Python imports at its start, in a directory of its own: before any code of ours."""

CONTAINER = ("unshare", "-Ur", "--pid", "--fork", "--kill-child")

needs_namespaces = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*CONTAINER, "true"], capture_output=True).returncode != 0,
    reason="needs user and PID namespaces",
)


def entrypoint_of_the_image(tmp_path: Path) -> list[str]:
    text = (ROOT / "trainer_image" / "Dockerfile").read_text()
    found = re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert found
    return [*json.loads(found[1]), "--no_such_setting=1"]


def command_of_a_stage(tmp_path: Path) -> list[str]:
    package = compile_to(tmp_path / "pipeline.yaml", load_settings({}), "kfp")
    spec = next(iter(yaml.safe_load_all(package.read_text())))
    container = spec["deploymentSpec"]["executors"]["exec-no-targets"]["container"]
    outputs = {
        "parameters": {"place": {"outputFile": str(tmp_path / "place")}},
        "outputFile": str(tmp_path / "output.json"),
    }
    executor_input = json.dumps({"inputs": {}, "outputs": outputs})
    arguments = [executor_input if part == "{{$}}" else part for part in container["args"]]
    return [*container["command"], *arguments]


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_a_command_watches_before_it_imports_what_takes_a_while(path: Path) -> None:
    body = [ast.unparse(part) for part in ast.parse(path.read_text(encoding="utf-8")).body[1:4]]
    # Some pipelines need their annotations as they are
    if body[0] == "from __future__ import annotations":
        del body[0]
    watching, at_once = body[:2]
    assert watching == "from trainer.runtime.signals import watch_signals"
    assert at_once == "if __name__ == '__main__':\n    watch_signals()"


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.stem)
def test_a_stage_watches_before_it_imports_what_takes_a_while(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    (stage,) = [part for part in body if isinstance(part, ast.FunctionDef) and part.decorator_list]
    first = next(i for i, line in enumerate(stage.body) if isinstance(line, ast.ImportFrom))
    starting, started = stage.body[first : first + 2]
    assert ast.unparse(starting) == "from trainer.runtime.commands import start_stage"
    assert ast.unparse(started) == "start_stage()"


@needs_namespaces
@pytest.mark.parametrize("command", [entrypoint_of_the_image, command_of_a_stage])
def test_a_stop_before_there_is_a_handler(
    command: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SLOW_START)
    paths = (tmp_path, ROOT, ROOT / "trainer_image")
    process = subprocess.Popen(
        [*CONTAINER, *command(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    (line,) = errors.splitlines()
    assert json.loads(line)["message"] == "stopped by SIGTERM"
