"""The compiled commands that `make image-test` runs, and how what came of them is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.stages import STAGES
from tests.image.checks import Failures, compare
from tests.image.digests import digests
from tests.image.engine import Engine
from tests.image.stages import CustomJobs, compiled_for, told_to
from tests.image.stops import Stop
from trainer.targets.shards import (
    ESTIMATOR,
    MadeWith,
    description_name,
    dump_description,
    shard_name,
)

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


MADE = MadeWith(
    tokens="tokens",
    tokenizer="",
    train_tokens=10,
    validation_tokens=2,
    teacher="a/teacher",
    teacher_digest="",
    teacher_precision="float32",
    vocabulary=4,
    teacher_context=4,
    temperatures=(1.0,),
    record_bytes=32,
    seed=0,
    estimator=ESTIMATOR,
    contexts=(4,),
)


def shard_in(directory: Path, made: MadeWith, records: bytes) -> dict[str, str]:
    """Write a shard, the same records for each place; returns the digests of its directory."""
    directory.mkdir()
    name, content = shard_name(0), b""
    for window in made.windows_of(0):
        kept = records * len(made.places_of(window))
        content += kept + made.checksum(window, kept)
    (directory / name).write_bytes(content)
    (directory / description_name(name)).write_bytes(dump_description(made, name, "AAAAAA=="))
    return digests({"targets": ("directory", [str(directory)])})["targets"]


def test_digests_of_targets_are_of_their_records_alone(tmp_path: Path) -> None:
    """Another name of the teacher changes no digest; another record does."""
    before = shard_in(tmp_path / "before", MADE, bytes(32))
    renamed = replace(MADE, teacher="gs://bucket/teacher")
    assert list(before) == [shard_name(0)]
    assert shard_in(tmp_path / "renamed", renamed, bytes(32)) == before
    assert shard_in(tmp_path / "other", MADE, bytes([1] * 32)) != before
    contents = {path.read_bytes() for path in tmp_path.glob("*/*.bin")}
    assert len(contents) == 3


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
