"""The script that sets a project up, run by bash; the far end of gcloud alone is not Google's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "google_cloud.sh"
GCLOUD = """#!/bin/sh
case "$*" in
    *get-value*) echo "$ACCOUNT"; exit 0 ;;
    *describe*) exit "$ABSENT" ;;
esac
echo "$*" >> "$COMMANDS"
"""
STAGES = "serviceAccount:stages@p.iam.gserviceaccount.com"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    program = tmp_path / "gcloud"
    program.write_text(GCLOUD)
    program.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "COMMANDS": str(tmp_path / "commands"),
        "ACCOUNT": "me@example.com",
        "ABSENT": "1",
    }


def set_up(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(SCRIPT), *argv], capture_output=True, text=True, env=environment)


def commands(environment: dict[str, str]) -> list[str]:
    path = Path(environment["COMMANDS"])
    return path.read_text().splitlines() if path.exists() else []


def rights(environment: dict[str, str]) -> set[tuple[str, str, str]]:
    """Of each binding: what it is on, whose it is, and its role."""
    found = set()
    for command in commands(environment):
        _, binding, after = command.partition("add-iam-policy-binding ")
        if binding:
            words = after.split()
            named = {w.partition("=")[0]: w.partition("=")[2] for w in words}
            found.add((words[0], named["--member"], named["--role"].removeprefix("roles/")))
    return found


def test_exactly_the_rights_that_are_needed(environment: dict[str, str]) -> None:
    done = set_up(environment, "p", "europe-west4", "artifacts", "images", "stages")
    assert done.returncode == 0, done.stderr
    email = STAGES.partition(":")[2]
    assert rights(environment) == {
        ("gs://artifacts", STAGES, "storage.objectUser"),
        ("images", STAGES, "artifactregistry.reader"),
        ("p", STAGES, "aiplatform.user"),
        (email, STAGES, "iam.serviceAccountUser"),
        ("p", "user:me@example.com", "aiplatform.user"),
        (email, "user:me@example.com", "iam.serviceAccountUser"),
    }
    created = [line for line in commands(environment) if " create " in line]
    assert [line.split("create ")[1].split()[0] for line in created] == [
        "gs://artifacts",
        "images",
        "stages",
    ]
    assert "PIPELINE_ROOT=gs://artifacts/runs SERVICE_ACCOUNT=stages@p.iam" in done.stdout


def test_what_is_there_is_left_as_it_is(environment: dict[str, str]) -> None:
    given = environment | {"ABSENT": "0", "SUBMITTER": "serviceAccount:ci@p.iam"}
    done = set_up(given, "p", "europe-west4", "gs://artifacts", "images", "stages", "hf")
    assert done.returncode == 0, done.stderr
    assert not any(" create " in line for line in commands(environment))
    assert ("hf", STAGES, "secretmanager.secretAccessor") in rights(environment)
    assert ("p", "serviceAccount:ci@p.iam", "aiplatform.user") in rights(environment)


def test_nothing_is_changed(environment: dict[str, str]) -> None:
    done = set_up(environment | {"DRY_RUN": "1"}, "p", "europe-west4", "b", "images", "stages")
    assert done.returncode == 0, done.stderr
    assert "gcloud storage buckets create gs://b --project=p" in done.stdout
    for given, argv in ((environment, ("p",)), (environment | {"ACCOUNT": ""}, tuple("prbia"))):
        done = set_up(given, *argv)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert commands(environment) == []


def test_the_script_is_clean() -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "make setup installs it"
    done = subprocess.run([shellcheck, str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
