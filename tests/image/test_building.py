"""What `make image-test` builds, as far as that needs no engine."""

from __future__ import annotations

import configparser
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.image.__main__ import recipe_from_environment
from tests.image.engine import WRAPPER, Engine, Mount, Skipped, find_engine
from tests.image.image import (
    DOCKERFILE,
    LOCK,
    ROOT,
    Recipe,
    base_image,
    cpu_lock,
    make_context,
    pip_mounts,
)
from trainer.runtime.errors import UsageError

PLAIN = Recipe(full=False, cpu_index="https://example.org/cpu", base="", mirror="")
PODMAN = Engine("podman", ("podman",))


def test_the_context_has_what_the_dockerfile_copies_and_the_lock_of_the_cpu(tmp_path: Path) -> None:
    make_context(PLAIN, tmp_path)
    assert (tmp_path / DOCKERFILE).read_bytes() == (ROOT / DOCKERFILE).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {
        ".dockerignore",
        "components",
        "trainer_image",
    }
    assert not list(tmp_path.rglob("__pycache__"))
    first, *lines = (tmp_path / LOCK).read_text().splitlines()
    assert first == "--extra-index-url https://example.org/cpu"
    left_out = set((ROOT / LOCK).read_text().splitlines()) - set(lines)
    assert any(line.startswith("triton==") for line in left_out)
    assert all(line.startswith(("nvidia-", "cuda-", "triton==")) for line in left_out)
    assert any(line.startswith("torch==") for line in lines)
    assert cpu_lock("torch==1\n", "") == "torch==1\n"


def test_the_full_context_has_the_lock_as_it_is(tmp_path: Path) -> None:
    make_context(replace(PLAIN, full=True), tmp_path)
    assert (tmp_path / LOCK).read_bytes() == (ROOT / LOCK).read_bytes()


def test_what_pip_is_configured_with_holds_in_the_build(tmp_path: Path) -> None:
    index, wheels, certificate = tmp_path / "index", tmp_path / "wheels", tmp_path / "ca.pem"
    for directory in (index / "simple", wheels):
        directory.mkdir(parents=True)
    certificate.touch()
    listed = [
        f"global.cert={str(certificate)!r}",
        "global.cache-dir='/elsewhere'",
        "global.extra-index-url='https://example.org/other'",
        f"install.find-links={str(wheels)!r}",
        f":env:.extra-index-url='https://example.org/simple file://{index}/simple'",
    ]
    file, *others = pip_mounts("\n".join(listed), tmp_path)
    assert file.target == "/etc/pip.conf"
    assert set(others) == {
        Mount(certificate, "/etc/pip-cert.pem"),
        Mount(index, str(index)),
        Mount(wheels, str(wheels)),
    }
    written = configparser.RawConfigParser()
    written.read(file.source)
    assert dict(written["global"]) == {
        "cert": "/etc/pip-cert.pem",
        "extra-index-url": f"https://example.org/simple file://{index}/simple",
        "find-links": str(wheels),
    }


def test_without_a_configuration_nothing_is_mounted(tmp_path: Path) -> None:
    assert pip_mounts("", tmp_path) == []


def test_the_base_is_the_one_of_the_dockerfile() -> None:
    assert base_image().startswith("docker.io/nvidia/cuda:")


def test_without_an_engine_it_is_skipped_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Skipped, match="neither docker nor podman answers.*apt-get install.*runc"):
        find_engine("", None)
    with pytest.raises(Skipped, match="docker does not answer"):
        find_engine("docker", None)
    with pytest.raises(Skipped, match="apt-get install debootstrap"):
        replace(PLAIN, base="debootstrap").check(PODMAN)


def test_bad_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="ENGINE='rkt': choose one of docker, podman"):
        find_engine("rkt", None)
    with pytest.raises(UsageError, match="BASE='bookworm': give debootstrap, or an archive"):
        replace(PLAIN, base="bookworm").check(PODMAN)
    with pytest.raises(UsageError, match="BASE: docker would keep"):
        replace(PLAIN, base="debootstrap").check(Engine("docker", ("docker",)))
    monkeypatch.setenv("FULL", "yes")
    with pytest.raises(UsageError, match="FULL='yes': 1 or 0 is needed"):
        recipe_from_environment()


def test_a_container_may_do_nothing_that_it_need_not() -> None:
    command = PODMAN.run_command(
        "image",
        ["env", "--block-signal=TERM", "sh"],
        name="one",
        mounts=[Mount(Path("/a"), "/b"), Mount(Path("/c"), "/d", writable=True)],
        environment={"A": "1"},
    )
    at = command.index("image")
    assert command[at + 1 :] == ["--block-signal=TERM", "sh"]
    options = set(command[2:at])
    assert {
        "--user=12345:0",
        "--read-only",
        "--cap-drop=all",
        "--network=none",
        "--entrypoint=env",
        "--volume=/a:/b:ro",
        "--volume=/c:/d",
        "--env=A=1",
    } <= options


def test_the_wrapper_leaves_the_limits_of_a_bundle(tmp_path: Path) -> None:
    runc = tmp_path / "runc"
    runc.write_text('#!/bin/sh\necho "$@"\n')
    runc.chmod(0o755)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    content: dict[str, Any] = {"process": {"rlimits": [{"type": "RLIMIT_NOFILE"}], "args": ["a"]}}
    for arguments in (["create", "--bundle", str(bundle), "id"], ["create", f"--bundle={bundle}"]):
        (bundle / "config.json").write_text(json.dumps(content))
        done = subprocess.run(
            [sys.executable, str(WRAPPER), *arguments],
            capture_output=True,
            text=True,
            env={"PATH": str(tmp_path)},
        )
        assert done.stdout.split() == arguments
        assert json.loads((bundle / "config.json").read_text()) == {"process": {"args": ["a"]}}
