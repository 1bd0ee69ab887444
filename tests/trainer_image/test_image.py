"""The image's recipe: linted, locked, and with nothing that the stages do not need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "trainer_image"


def pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return dict(line.split("==") for line in lines if line)


def test_the_dockerfile_is_clean() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [str(hadolint), str(IMAGE / "Dockerfile")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout == ""


def test_the_lock_agrees_with_what_was_tested() -> None:
    tested, locked = pins(ROOT / "constraints.txt"), pins(IMAGE / "requirements.lock")
    assert locked.items() <= tested.items()
    assert {"torch", "transformers", "datasets", "kfp", "google-cloud-storage"} <= set(locked)
    assert not {"pytest", "ruff", "mypy", "google-cloud-aiplatform"} & set(locked)


def test_the_base_is_pinned_and_the_user_is_not_root() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", bases[0])
    assert "USER 1001" in text
