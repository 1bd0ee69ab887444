"""A run is about what buckets and the hub held when it was submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
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
from tests.pipelines.google_services import GoogleServices
from tests.pipelines.test_submit import Done, run, run_process
from trainer.data.remote_data import pinned
from trainer.models.hugging_face import locate
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import LiquidError
from trainer.settings.config import TrainConfig

TEACHER, DATA = "1" * 40, "2" * 40
"""Commits on the hub."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[GoogleServices]:
    server = GoogleServices(tmp_path, tls=False)
    answer = {"gated": False, "private": False}
    server.rules = {
        "GET /api/models/gpt2-xl": (200, {"id": "gpt2-xl", "sha": TEACHER} | answer),
        "GET /api/datasets/wikitext": (200, {"id": "wikitext", "sha": DATA} | answer),
    }
    yield server
    server.close()


def of_the_hub(hub: GoogleServices) -> dict[str, str]:
    given = {"HF_ENDPOINT": hub.url, "TRAINER_IMAGE": "image", "HOST": "http://localhost:9"}
    return given | {"DRY_RUN": "1", "JSON": "1"}


def sent(done: Done) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout.partition("---")[0])
    return dict(request.get("arguments") or request.get("params") or {})


def told(done: Done) -> list[str]:
    lines = [json.loads(line)["message"] for line in done.stderr.splitlines() if line[:1] == "{"]
    return [line for line in lines if "pinned" in line]


def put(uri: str, data: bytes) -> None:
    bucket, _, name = uri.removeprefix("gs://").partition("/")
    storage.Client().bucket(bucket).blob(name).upload_from_string(data)


@pytest.fixture
def places(gcs_bucket: str, teacher_dir: Path) -> dict[str, Any]:
    for path in teacher_dir.iterdir():
        put(f"{gcs_bucket}/teacher/{path.name}", path.read_bytes())
    put(f"{gcs_bucket}/texts/train.txt", b"one")
    return {
        "teacher_name": f"{gcs_bucket}/teacher",
        "dataset_name": f"{gcs_bucket}/texts",
        "dataset_config": "",
    }


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


def test_what_is_on_the_hub_is_sent_with_its_commit(hub: GoogleServices) -> None:
    done = run("submit", of_the_hub(hub), "kfp")
    assert sent(done) == {"teacher_revision": TEACHER, "dataset_revision": DATA}
    assert told(done) == [
        f"teacher gpt2-xl is pinned to commit {TEACHER[:12]} of the hub",
        f"data set wikitext is pinned to commit {DATA[:12]} of the hub",
    ]
    kept = run("submit", of_the_hub(hub) | {"PARAMS": "teacher_revision=v1 seed=7"}, "kfp")
    given = {"teacher_revision": "v1", "seed": 7, "dataset_revision": DATA}
    assert sent(kept) == given
    assert len(hub.requests) == 3


def test_a_hub_that_does_not_say_keeps_nothing_from_being_sent(hub: GoogleServices) -> None:
    words = "is not pinned, and the cache takes it for unchanged"
    hub.rules = {"GET /api/models/": (404, {})}
    hub.headers = {"X-Error-Code": "RepoNotFound"}
    done = run("submit", of_the_hub(hub), "kfp")
    assert sent(done) == {}
    absent, unnamed = told(done)
    assert absent.startswith(f"teacher gpt2-xl {words}: it is not there, or not open to your token")
    assert absent.endswith("; teacher_revision in PARAMS pins it")
    assert unnamed.startswith(f"data set wikitext {words}: the hub names no commit; ")
    hub.rules, hub.headers = {"GET /api/": (502, "<html>")}, {}
    down = told(run("submit", of_the_hub(hub), "kfp"))
    assert len(down) == 2
    assert all(f"{words}: the hub did not say (Server error '502" in line for line in down)
    away = run("submit", of_the_hub(hub) | {"HF_ENDPOINT": "http://localhost:9"}, "kfp")
    assert sent(away) == {}
    assert all(f"{words}: the hub did not say (" in line for line in told(away))
    hub.requests.clear()
    offline = run_process("submit", of_the_hub(hub) | {"HF_HUB_OFFLINE": "1"}, "kfp")
    assert sent(offline) == {}
    assert all(f"{words}: HF_HUB_OFFLINE is set" in line for line in told(offline))
    assert hub.requests == []


def test_the_runs_of_a_schedule_take_what_is_there_then(hub: GoogleServices) -> None:
    given = of_the_hub(hub) | {"CRON": "0 3 * * 1", "PARAMS": "seed=7"}
    done = run("schedule", given)
    assert sent(done) == {"seed": 7}
    (line,) = told(done)
    assert line.startswith("not pinned: each run takes teacher and data set as they are then")
    assert hub.requests == []


def test_a_repetition_asks_only_for_what_is_given(
    hub: GoogleServices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    known = parameter_defaults()
    assert with_revisions({"seed": 7}, known, hub=True) == {"seed": 7}
    found = with_revisions({"teacher_name": "gpt2-xl"}, known, hub=True)
    assert found == {"teacher_name": "gpt2-xl", "teacher_revision": TEACHER}
    assert len(hub.requests) == 1
