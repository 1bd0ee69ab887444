"""Which code is said to run: in a checkout, changed or not, outside of one, and in an image."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import trainer
from trainer.runtime.provenance import CODE_COMMIT, STAGE_IMAGE, commit_of, running_code


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*command: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *command],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    package, other = tmp_path / "package", tmp_path / "installed"
    for directory in (package, other):
        directory.mkdir()
        (directory / "__init__.py").touch()
    git("init", "--quiet")
    assert commit_of(package) is None
    commit_of.cache_clear()
    git("add", "package")
    git("commit", "--quiet", "--message=first")
    git("tag", "v1")
    head = git("rev-parse", "HEAD")
    assert commit_of(package) == head
    assert commit_of(other) is None, "it lies there, but is none of the checkout"
    (package / "__init__.py").write_text("changed")
    commit_of.cache_clear()
    assert commit_of(package) == f"{head}-dirty"


def test_an_image_names_itself_and_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert running_code()["image"] is None
    monkeypatch.setenv(STAGE_IMAGE, "europe-docker.pkg.dev/p/r/trainer@sha256:1")
    monkeypatch.setenv(CODE_COMMIT, "c" * 40)
    assert running_code() == {
        "version": trainer.__version__,
        "commit": "c" * 40,
        "image": "europe-docker.pkg.dev/p/r/trainer@sha256:1",
    }
