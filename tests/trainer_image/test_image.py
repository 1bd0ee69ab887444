"""The image's recipe: linted, locked, and with nothing that the stages do not need."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.faults.test_first_process import command_of_a_stage
from tests.image.image import CUDA

WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name in {}:
            raise ImportError(name)

sys.meta_path.insert(0, Without())
"""

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "trainer_image"


def pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pairs}


CLIENT = {"kfp-server-api", "kubernetes"}
"""What kfp asks for and its executor does without."""


def needed(*roots: str) -> set[str]:
    """Everything that some packages ask for, here and with the extras that they name.

    But for kfp's client, and what only that asks for.
    """
    found: set[str] = set()
    todo = [Requirement(root) for root in roots]
    while todo:
        asked = todo.pop()
        found.add(canonicalize_name(asked.name))
        for line in requires(asked.name) or ():
            below = Requirement(line)
            if canonicalize_name(below.name) in CLIENT:
                continue
            extras = asked.extras or {""}
            wanted = below.marker is None or any(
                below.marker.evaluate({"extra": extra}) for extra in extras
            )
            if wanted and (canonicalize_name(below.name) not in found or below.extras):
                todo.append(below)
    return found


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(hadolint), str(IMAGE / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_the_lock_agrees_with_what_was_tested() -> None:
    tested, locked = pins(ROOT / "constraints.txt"), pins(IMAGE / "requirements.lock")
    assert {name: v for name, v in locked.items() if not CUDA.fullmatch(name)}.items() <= (
        tested.items()
    )
    assert {"torch", "triton", "nvidia-nccl-cu13"} <= set(locked)


def test_the_lock_holds_what_the_stages_need_and_no_more() -> None:
    locked = {name for name in pins(IMAGE / "requirements.lock") if not CUDA.fullmatch(name)}
    found = needed("liquid-annealing[cloud]", "kfp", "google-cloud-aiplatform") - {
        "liquid-annealing"
    }
    assert locked == {name for name in found if not CUDA.fullmatch(name)}


def test_nothing_is_built_from_source() -> None:
    """A source would be built with the tools of the day, or with what the base happens to have."""
    text = (IMAGE / "Dockerfile").read_text()
    assert re.search(r"pip install .*--no-deps --only-binary=:all:", text)


def test_a_stage_runs_without_the_client_of_kfp(tmp_path: Path) -> None:
    blocked = {name.replace("-", "_") for name in CLIENT}
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(blocked))
    paths = (tmp_path, ROOT, IMAGE)
    done = subprocess.run(
        command_of_a_stage(tmp_path),
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "output.json").read_text())["parameterValues"] == {"place": ""}


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", bases[0])
    assert "USER 1001" in text


def test_all_that_is_copied_exists_and_is_sent_to_the_builder() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text().split() if line[0] == "!"}
    copied = re.findall(r"^COPY (?!--from)(\S+) ", text, re.MULTILINE)
    assert set(copied) == sent
    assert all((ROOT / path).exists() for path in copied)
