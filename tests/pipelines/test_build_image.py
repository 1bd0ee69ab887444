"""The commands that build the image; the tools themselves are not on a machine for tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pipelines.build_image import ROOT, commands, main
from pipelines.settings import load_settings
from trainer.runtime.errors import LiquidError, UsageError

IMAGE = "europe-docker.pkg.dev/p/r/trainer:1"


@pytest.mark.parametrize("builder", ["cloud", "docker"])
def test_the_commands_name_the_image_and_files_that_exist(builder: str) -> None:
    settings = load_settings({"TRAINER_IMAGE": IMAGE, "PROJECT": "p"})
    build, *others = commands(settings, builder)
    assert any(IMAGE in part for part in build)
    assert all(IMAGE in line for line in others)
    (recipe,) = [part for part in build if part.startswith("trainer_image/")]
    assert (ROOT / recipe).is_file()


def test_a_dry_run_takes_the_image_from_the_settings_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline.yaml").write_text(f"trainer_image: {IMAGE}\nproject: p\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DRY_RUN", "1")
    main([])
    build, described = map(shlex.split, capsys.readouterr().out.splitlines())
    assert build[:3] == ["gcloud", "builds", "submit"]
    (commit,) = [part.partition(f"_IMAGE={IMAGE},_COMMIT=")[2] for part in build if IMAGE in part]
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", commit)
    assert described[-1] == "value(image_summary.fully_qualified_digest)"


@pytest.mark.parametrize(
    ("environ", "builder", "message"),
    [
        ({}, "cloud", "missing: TRAINER_IMAGE"),
        ({"TRAINER_IMAGE": "a/b@sha256:1"}, "docker", r"name a tag, such as a/b:1"),
        ({"TRAINER_IMAGE": IMAGE}, "podman", "BUILDER='podman': choose one of cloud, docker"),
    ],
)
def test_images_that_cannot_be_built(environ: dict[str, str], builder: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        commands(load_settings(environ), builder)


def test_a_tool_that_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_IMAGE", IMAGE)
    monkeypatch.setenv("BUILDER", "docker")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LiquidError, match="docker is not installed here"):
        main([])
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "docker").chmod(0o755)
    with pytest.raises(LiquidError, match="docker build .* ended with status 3"):
        main([])
