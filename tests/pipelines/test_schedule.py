"""Schedules by the real clients, against the loopback services."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.schedule import with_seconds
from tests.pipelines.google_services import GoogleServices
from tests.pipelines.loopback import Loopback
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
    absent = environment | {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}
    done = run("schedule", absent | {"DRY_RUN": "1"})
    assert done.returncode == 0, "nothing is sent, so no credentials are needed"


# ── open-source Kubeflow Pipelines


@pytest.fixture
def given(kubeflow: Loopback) -> dict[str, str]:
    return {
        "HOST": kubeflow.url,
        "TRAINER_IMAGE": IMAGE,
        "CRON": "0 3 * * 1",
        "PARAMS": "seed=7",
        "PIPELINE_ROOT": "gs://bucket/root",
    }


def test_a_recurring_run_of_kubeflow(kubeflow: Loopback, given: dict[str, str]) -> None:
    done = run("schedule", given | {"CACHE": "0"})
    assert done.returncode == 0, done.stderr
    before, _, after = done.stdout.partition("scheduled at 0 0 3 * * 1 (seconds, minute,")
    assert "\ntotal: " in before
    assert after.endswith(f"{kubeflow.url}/#/recurringrun/details/s1\n")
    (body,) = [body for _, path, body in kubeflow.requests if "/recurringruns" in path]
    assert body["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
    assert (int(body["max_concurrency"]), body["no_catchup"], body["mode"]) == (1, True, "ENABLE")
    assert body["experiment_id"] == "e1"
    assert body["runtime_config"] == {
        "parameters": {"seed": 7},
        "pipeline_root": "gs://bucket/root",
    }
    spec = body["pipeline_spec"]
    spec = spec.get("pipeline_spec", spec)
    assert spec["deploymentSpec"]["executors"]["exec-train"]["container"]["image"] == IMAGE
    tasks = spec["root"]["dag"]["tasks"].values()
    assert not any(task["cachingOptions"].get("enableCache") for task in tasks)


def test_times_as_kubeflow_writes_them() -> None:
    assert with_seconds("*/5 3 * * *") == "0 */5 3 * * *"
    assert with_seconds("0 3 1 1 5,7") == "0 0 3 1 1 5,0"


def test_what_kubeflow_cannot_schedule(kubeflow: Loopback, given: dict[str, str]) -> None:
    for changes, message in (
        ({"CRON": "TZ=Europe/Berlin 0 3 * * 1"}, "goes by the time zone of its server"),
        ({"CRON": "0 0 3 * * 1"}, "five fields are needed"),
        ({"TRAINER_IMAGE": ""}, "missing: TRAINER_IMAGE"),
        ({"HOST": "localhost"}, "must start with http://"),
    ):
        done = run("schedule", given | changes)
        assert done.returncode == 2
        assert message in last_message(done)
    assert kubeflow.requests == []
    kubeflow.refusal = (400, "INVALID_ARGUMENT", "Schedule cron is not a supported format")
    done = run("schedule", given)
    assert done.returncode == 1
    assert "Schedule cron is not a supported format" in last_message(done)


def test_a_dry_run_for_kubeflow(kubeflow: Loopback, given: dict[str, str]) -> None:
    done = run("schedule", given | {"DRY_RUN": "1"})
    assert done.stdout.startswith("estimate of liquid-annealing on open-source Kubeflow")
    done = run("schedule", given | {"DRY_RUN": "1", "JSON": "1", "EXPERIMENT": "weekly"})
    request, _, spec = done.stdout.partition("---")
    shown = json.loads(request)
    assert (shown["cron_expression"], shown["experiment_name"]) == ("0 0 3 * * 1", "weekly")
    assert next(yaml.safe_load_all(spec))["pipelineInfo"]["name"] == "liquid-annealing"
    assert kubeflow.requests == []
