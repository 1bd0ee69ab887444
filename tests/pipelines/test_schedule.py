"""A schedule by the real client, against the loopback services."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pipelines.google_services import GoogleServices
from tests.pipelines.test_submit import IMAGE, last_message, pools_of, run

ACCOUNT = "stages@p.iam.gserviceaccount.com"


@pytest.fixture
def services(tmp_path: Path) -> Iterator[GoogleServices]:
    server = GoogleServices(tmp_path)
    yield server
    server.close()


@pytest.fixture
def environment(services: GoogleServices, tmp_path: Path) -> dict[str, str]:
    created = (200, {"name": "projects/p/locations/europe-west4/schedules/7", "cron": "0 3 * * 1"})
    services.rules = {"POST /v1/projects/p/locations/europe-west4/schedules": created}
    return services.overrides() | {
        "PROJECT": "p",
        "REGION": "europe-west4",
        "PIPELINE_ROOT": "gs://artifacts/runs",
        "TRAINER_IMAGE": IMAGE,
        "SERVICE_ACCOUNT": ACCOUNT,
        "GOOGLE_APPLICATION_CREDENTIALS": str(services.service_account(tmp_path / "key.json")),
        "HF_ENDPOINT": "http://localhost:9",
        "CRON": "TZ=Europe/Berlin 0 3 * * 1",
        "PARAMS": "seed=7",
    }


def test_a_schedule_submits_what_a_submission_would(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    done = run("schedule", environment)
    assert done.returncode == 0, done.stderr
    before, scheduled, _ = done.stdout.partition("scheduled projects/p/locations/europe-west4/sch")
    assert scheduled
    assert "\ntotal: " in before
    assert "? teacher: could not be checked" in done.stdout
    (body,) = [body for _, path, body in services.requests if "/schedules" in path]
    assert body["cron"] == "TZ=Europe/Berlin 0 3 * * 1"
    assert int(body["maxConcurrentRunCount"]) == 1
    job = body["createPipelineJobRequest"]["pipelineJob"]
    assert job["serviceAccount"] == ACCOUNT
    assert job["runtimeConfig"]["parameterValues"] == {"seed": 7}
    assert job["runtimeConfig"]["gcsOutputDirectory"] == "gs://artifacts/runs"
    assert set(pools_of(job["pipelineSpec"])) == {
        "teacher-targets",
        "anneal",
        "lm-eval",
        "continue",
        "evaluate",
    }


def test_what_makes_no_schedule(services: GoogleServices, environment: dict[str, str]) -> None:
    for cron in ("", "daily", "0 3 * *", "0 3 * * 1; rm"):
        done = run("schedule", environment | {"CRON": cron})
        assert done.returncode == 2
        assert last_message(done).startswith(f"CRON={cron!r}: five fields are needed")
    services.rules = {"iam/testPermissions": (200, {}), **services.rules}
    done = run("schedule", environment)
    assert done.returncode == 1
    assert last_message(done).startswith("nothing was sent: ")
    assert not any("/schedules" in path for _, path, _ in services.requests)


def test_a_dry_run(services: GoogleServices, environment: dict[str, str]) -> None:
    done = run("schedule", environment | {"DRY_RUN": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("estimate of liquid-annealing on Vertex AI in europe-west4")
    assert "displayName" not in done.stdout
    done = run("schedule", environment | {"DRY_RUN": "1", "JSON": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["displayName"] == "liquid-annealing"
    assert services.requests == []
