"""A run is about the files that a bucket held when it was submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from google.cloud import storage

from pipelines import submit
from pipelines.anneal import build_pipeline
from pipelines.local_runs import PARAMETERS, RUNS
from pipelines.parameters import check_cloud_parameters, parameter_defaults
from pipelines.pins import with_revisions
from pipelines.settings import Settings
from pipelines.spec import compiled
from tests.conftest import log_as_it_was
from trainer.data.remote_data import pinned
from trainer.models.hugging_face import locate
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import LiquidError
from trainer.settings.config import TrainConfig


def put(uri: str, data: bytes) -> None:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    storage.Client().bucket(bucket).blob(name).upload_from_string(data)


@pytest.fixture
def places(gcs_bucket: str, teacher_dir: Path) -> dict[str, Any]:
    for path in teacher_dir.iterdir():
        put(f"{gcs_bucket}/teacher/{path.name}", path.read_bytes())
    put(f"{gcs_bucket}/texts/train.txt", b"one")
    return {"teacher_name": f"{gcs_bucket}/teacher", "dataset_name": f"{gcs_bucket}/texts"}


def test_the_revisions_are_those_that_the_stages_find(
    places: dict[str, Any], tmp_path: Path
) -> None:
    check_cloud_parameters(places)
    found = with_revisions(places, parameter_defaults())
    located = locate(Pretrained(places["teacher_name"], cache_dir=str(tmp_path)), "weights")
    assert found["teacher_revision"] == located.model.revision
    data = TrainConfig(dataset_name=places["dataset_name"])
    assert found["dataset_revision"] == pinned(data).dataset_revision
    put(f"{places['dataset_name']}/train.txt", b"two")
    put(f"{places['teacher_name']}/notes.txt", b"words")
    again = with_revisions(places, parameter_defaults())
    assert len({found["dataset_revision"], again["dataset_revision"]}) == 2
    assert len({found["teacher_revision"], again["teacher_revision"]}) == 2


def test_only_what_a_bucket_holds_and_nobody_pinned_is_looked_up(places: dict[str, Any]) -> None:
    known = parameter_defaults()
    given = {"teacher_name": "gs://no-such-bucket/teacher", "teacher_revision": "abc", "seed": 1}
    assert with_revisions(given, known) == given
    hub = {"teacher_name": "gpt2", "dataset_name": "wikitext", "dataset_revision": "v1"}
    assert with_revisions(hub, known) == hub | {"teacher_revision": ""}
    assert with_revisions(places, ["teacher_name", "dataset_name"]) == places
    assert with_revisions({}, known) == {}


@pytest.mark.parametrize("name", ["teacher_name", "dataset_name"])
def test_what_is_not_there_is_told_before_anything_is_sent(name: str, gcs_bucket: str) -> None:
    put(f"{gcs_bucket}/texts/model.bin", b"")
    for place, message in (
        (f"{gcs_bucket}/absent", "there is no object at"),
        (f"{gcs_bucket}/texts", r"no file of a known kind|it has no config\.json"),
    ):
        with pytest.raises(LiquidError, match=f"PARAMS: {name}: .*({message})"):
            with_revisions({name: place}, parameter_defaults())


def test_a_run_is_sent_with_its_revisions(
    places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARAMS", " ".join(f"{name}={value}" for name, value in places.items()))
    for name, value in {"DRY_RUN": "1", "JSON": "1", "TRAINER_IMAGE": "image", "HOST": "h"}.items():
        monkeypatch.setenv(name, value)
    with log_as_it_was():
        submit.main(["kfp"])
    request, _, _ = capsys.readouterr().out.partition("---")
    assert json.loads(request)["arguments"] == with_revisions(places, parameter_defaults())


def test_the_file_of_a_local_runs_parameters_has_its_revisions(
    places: dict[str, Any], tmp_path: Path
) -> None:
    given = " ".join(f"{name}={value}" for name, value in places.items())
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.local", str(tmp_path)],
        env=os.environ | {"PARAMS": given, "RUN": "mine"},
        stderr=subprocess.PIPE,
        text=True,
    )
    file = tmp_path / RUNS / "mine" / PARAMETERS
    while not (file.exists() and file.read_text().endswith("}\n")) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 143, errors
    written = json.loads(file.read_text())["parameters"]
    assert written.items() >= with_revisions(places, parameter_defaults()).items()


def test_every_stage_with_a_teacher_gets_its_revision() -> None:
    spec = compiled(build_pipeline(Settings(), "local"))
    components = [*spec["components"].values()]
    inputs = [c.get("inputDefinitions", {}).get("parameters", {}) for c in components]
    with_teacher = [names for names in inputs if "teacher_name" in names]
    assert len(with_teacher) >= 4
    assert all("teacher_revision" in names for names in with_teacher)
