"""The compiled commands that `make image-test` runs, and how what came of them is judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.stages import STAGES
from tests.image.__main__ import Failures, compare
from tests.image.digests import digests
from tests.image.engine import Engine
from tests.image.stages import CustomJobs, compiled_for, told_to
from tests.image.stops import Stop

IMAGE = "localhost/trainer:cpu"
STOPPED = Stop("kfp", "in training", 143, 1.0, "stopped by SIGTERM at step 3", 0, "x at step 3", "")


@pytest.mark.parametrize("backend", ["kfp", "vertex"])
def test_every_stage_runs_its_own_container(backend: str, tmp_path: Path) -> None:
    spec = compiled_for(backend, IMAGE, tmp_path)
    containers = [e["container"] for e in spec["deploymentSpec"]["executors"].values()]
    assert len(containers) == len([stage for stage in STAGES.values() if not stage.setting])
    for container in containers:
        assert container["image"] == IMAGE
        assert container["command"][:2] == ["env", "--block-signal=TERM"]
        assert container["args"][:2] == ["--executor_input", "{{$}}"]


def test_a_custom_job_is_told_of_the_bucket(tmp_path: Path) -> None:
    site = CustomJobs(Engine("podman", ("podman",)), IMAGE, tmp_path, "storage")
    artifact = {"artifacts": [{"name": "tokens", "uri": f"{tmp_path}/root/tokens"}]}
    told: dict[str, Any] = {
        "inputs": {
            "parameterValues": {"place": "gs://bucket/root/x"},
            "artifacts": {"t": artifact},
        },
        "outputs": {"outputFile": f"{tmp_path}/root/out.json"},
    }
    seen = site.seen(told)
    assert seen["inputs"]["artifacts"]["t"]["artifacts"][0]["uri"] == "gs://bucket/root/tokens"
    assert seen["outputs"]["outputFile"] == "/gcs/bucket/root/out.json"
    assert seen["inputs"]["parameterValues"] == told["inputs"]["parameterValues"]
    at, read = told_to(["python3", "--executor_input", json.dumps(seen), "--function"])
    assert (at, read) == (2, seen)
    written = tmp_path / "out.json"
    written.write_text(json.dumps(seen))
    site.read_back(written)
    back = json.loads(written.read_text())
    assert back["inputs"] == told["inputs"]


@pytest.mark.parametrize(
    ("other", "failed"),
    [
        ({"tokens": {"a": "1", "b": "2"}}, ""),
        ({"tokens": {"a": "1", "b": "x"}}, "tokens differs: b at there"),
        ({"tokens": {"a": "1"}}, "tokens differs: b at there"),
        ({"tokens": {"a": "1", "b": "2", "c": "3"}}, "tokens differs: c at there"),
        ({}, "tokens differs: a at there, b at there"),
    ],
)
def test_what_differs_is_found(
    other: dict[str, dict[str, str]], failed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = Failures()
    compare({"here": {"tokens": {"a": "1", "b": "2"}}, "there": other}, failures)
    assert failures.found == ([failed] if failed else [])
    assert failed in capsys.readouterr().out


def test_an_output_that_is_nowhere_is_a_failure() -> None:
    failures = Failures()
    compare({"here": {"tokens": {}}, "there": {"tokens": {}}}, failures)
    assert failures.found == ["tokens differs: nothing is there"]


def test_digests_are_of_numbers_alone(tokens_dir: Path, targets_dir: Path, tmp_path: Path) -> None:
    """Another name of the teacher changes no digest; another record does."""
    made, index = targets_dir / "train-00000.bin", targets_dir / "train-00000.json"
    same, other = tmp_path / "same", tmp_path / "other"
    for directory in (same, other):
        directory.mkdir()
        content = json.loads(index.read_text())
        content["made_with"]["teacher"] = "another/name"
        (directory / index.name).write_text(json.dumps(content))
    records = bytearray(made.read_bytes())
    (same / made.name).write_bytes(records)
    records[0] ^= 1
    (other / made.name).write_bytes(records)
    places = {str(place): ("directory", [str(place)]) for place in (targets_dir, same, other)}
    found = {Path(name).name: files for name, files in digests(places).items()}
    before = found[targets_dir.name]
    assert set(before) == {made.name, "validation.bin"}
    assert found["same"][made.name] == before[made.name] != found["other"][made.name]
    tokens = digests({"tokens": ("directory", [str(tokens_dir)])})["tokens"]
    assert set(tokens) == {"train.bin", "validation.bin"}


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({}, ""),
        ({"status": 137}, "ended with 137, not 143"),
        ({"last_words": "Traceback"}, "its last line is 'Traceback'"),
        ({"again": 1}, "started again, it ended with 1"),
        ({"went_on": ""}, "started again, it began anew"),
        ({"went_on": "", "when": "at the start"}, ""),
    ],
)
def test_what_is_wrong_with_a_stop(changes: dict[str, Any], wrong: str) -> None:
    stop = Stop(**{**vars(STOPPED), **changes})
    assert stop.wrong.startswith(wrong)
    assert bool(stop.wrong) == bool(wrong)
