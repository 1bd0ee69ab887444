"""Submission and rerun with the real clients against loopback servers."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import signal
import subprocess
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from google.cloud.aiplatform.initializer import global_config

from pipelines import submit
from pipelines.spec import jobs_of
from tests.faults.server import ObjectServer
from tests.interrupts import with_interrupts
from tests.pipelines.loopback import Loopback
from tests.pipelines.test_compile import every_task
from trainer.runtime.commands import run_command
from trainer.runtime.log import FORMAT, log

IMAGE = "europe-docker.pkg.dev/p/r/trainer@sha256:" + "0" * 64
SERVICE_ACCOUNT = "robot@p.iam.gserviceaccount.com"
NETWORK = "projects/1/global/networks/private"
KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
PARENT = "projects/p/locations/europe-west4/pipelineJobs"


@pytest.fixture
def vertex(tmp_path: Path) -> Iterator[Loopback]:
    server = Loopback(tmp_path, tls=True)
    yield server
    server.close()


@pytest.fixture
def environment(vertex: Loopback, tmp_path: Path, object_server: ObjectServer) -> dict[str, str]:
    bucket = f"pipeline-root-{uuid.uuid4().hex}"
    object_server.make_bucket(bucket)
    return {
        "PROJECT": "p",
        "REGION": "europe-west4",
        "PIPELINE_ROOT": f"gs://{bucket}/runs",
        "TRAINER_IMAGE": IMAGE,
        "SERVICE_ACCOUNT": SERVICE_ACCOUNT,
        "NETWORK": NETWORK,
        "CMEK_KEY": KEY,
        "LABELS": "team=small-models",
        "API_ENDPOINT": f"localhost:{vertex.port}",
        "API_TRANSPORT": "rest",
        "GOOGLE_APPLICATION_CREDENTIALS": str(vertex.service_account(tmp_path / "key.json")),
        "REQUESTS_CA_BUNDLE": str(vertex.bundle),
        "STORAGE_EMULATOR_HOST": object_server.url,
        "POLL_SECONDS": "1",
        "PREFLIGHT": "0",  # tests/pipelines/test_preflight.py looks first
    }


Done = subprocess.CompletedProcess[str]

ROOT = Path(__file__).parents[2]


def around(environment: dict[str, str]) -> dict[str, str]:
    """The environment with what any process needs."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", FORMAT) if name in os.environ}
    kept |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'trainer_image'}", "HF_ENDPOINT": "http://localhost:9"}
    return kept | environment


def run_process(
    module: str, environment: dict[str, str], *argv: str, cwd: Path | None = None
) -> Done:
    """The command as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", f"pipelines.{module}", *argv],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env=around(environment),
        timeout=120,
    )


def run(module: str, environment: dict[str, str], *argv: str) -> Done:
    """The same within this process, which has imported the clients already: that takes seconds."""
    command = importlib.import_module(f"pipelines.{module}").main
    output, errors = io.StringIO(), io.StringIO()
    level = logging.getLogger().level
    log.handlers.clear()  # they write to the stderr of before
    vars(global_config).update(vars(type(global_config)()))  # it keeps credentials
    with (
        warnings.catch_warnings(),
        patch.dict(os.environ, around(environment), clear=True),
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        status = run_command(command, list(argv))
    logging.getLogger().setLevel(level)
    return subprocess.CompletedProcess(argv, status, output.getvalue(), errors.getvalue())


def last_message(done: Done) -> str:
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr, done.stderr
    return str(json.loads(lines[-1])["message"])


def pools_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """By title of a task that is a custom job: its worker pools."""
    found = {}
    for task in every_task(spec).values():
        component = spec["components"][task["componentRef"]["name"]]
        inputs = component.get("inputDefinitions", {}).get("parameters", {})
        own = task.get("inputs", {}).get("parameters", {}).get("worker_pool_specs")
        if own or "worker_pool_specs" in inputs:
            default = inputs["worker_pool_specs"].get("defaultValue")
            found[task["taskInfo"]["name"]] = own["runtimeValue"]["constant"] if own else default
    return found


def test_the_request_to_vertex(vertex: Loopback, environment: dict[str, str]) -> None:
    params = "continue_train_steps=8000 seed=7 anneal_lr_peak=3e-4"
    machines = {
        "ANNEAL_ACCELERATOR_TYPE": "NVIDIA_H100_80GB",
        "ANNEAL_ACCELERATOR_COUNT": "8",
        "ANNEAL_MACHINE_TYPE": "a3-highgpu-8g",
        "CONTINUE_REPLICAS": "2",
        "PREPARE_CPU": "16",
    }
    given = environment | machines | {"PARAMS": params, "CACHE": "0"}
    done = run_process("submit", given, "vertex")
    assert done.returncode == 0, done.stderr
    assert "https://console.cloud.google.com/vertex-ai/locations/europe-west4/" in done.stdout
    (request,) = [entry for entry in vertex.requests if entry[0] == "POST"]
    _, path, body = request
    assert path.startswith(f"/v1/{PARENT}?")
    assert body["serviceAccount"] == SERVICE_ACCOUNT
    assert body["network"] == NETWORK
    assert body["encryptionSpec"] == {"kmsKeyName": KEY}
    assert body["labels"]["team"] == "small-models"
    runtime = body["runtimeConfig"]
    assert runtime["gcsOutputDirectory"] == environment["PIPELINE_ROOT"]
    assert runtime["parameterValues"] == {
        "continue_train_steps": 8000,
        "seed": 7,
        "anneal_lr_peak": 3e-4,
    }
    spec = body["pipelineSpec"]
    every = every_task(spec).values()
    assert {task["cachingOptions"].get("enableCache", False) for task in every} == {False}
    executors = spec["deploymentSpec"]["executors"]
    assert executors["exec-prepare-tokens"]["container"]["image"] == IMAGE
    assert executors["exec-prepare-tokens"]["container"]["resources"]["cpuLimit"] == 16.0
    pools = pools_of(spec)
    assert pools["anneal"][0]["machine_spec"] == {
        "machine_type": "a3-highgpu-8g",
        "accelerator_type": "NVIDIA_H100_80GB",
        "accelerator_count": 8,
    }
    assert len(pools["continue"]) == 2
    assert pools["evaluate"][0]["container_spec"]["image_uri"] == IMAGE


def test_a_run_is_listed_in_the_experiment(
    vertex: Loopback, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.vertex._CONTEXT_SECONDS", 0.0)
    for _ in range(2):  # made by the first run, found by the second
        done = run("submit", environment | {"EXPERIMENT": "small-models"}, "vertex")
        assert done.returncode == 0, done.stderr
        ((name, experiment),) = vertex.contexts.items()
        assert name.endswith("/locations/europe-west4/metadataStores/default/contexts/small-models")
        assert experiment["schemaTitle"] == "system.Experiment"
        (child,) = experiment["children"]
        run_id = child.rpartition("/")[2]
        assert f"submitted {PARENT}/{run_id}" in done.stdout


def test_an_experiment_that_cannot_be_is_told_before_a_run_is_made(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    done = run("submit", environment | {"EXPERIMENT": "Small models"}, "vertex")
    assert done.returncode == 2
    assert last_message(done).startswith("EXPERIMENT='Small models': an experiment of Vertex AI is")
    assert vertex.requests == []
    store = "projects/p/locations/europe-west4/metadataStores/default"
    name = f"{store}/contexts/taken"
    vertex.contexts[name] = {"name": name, "schemaTitle": "system.PipelineRun"}
    done = run("submit", environment | {"EXPERIMENT": "taken"}, "vertex")
    assert done.returncode == 2
    assert last_message(done).startswith("EXPERIMENT=taken: Experiment name taken is of type")
    assert not vertex.jobs


def test_a_run_that_its_experiment_does_not_list_is_told_to_go_on(
    vertex: Loopback, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.vertex._CONTEXT_SECONDS", 0.0)
    monkeypatch.setattr("pipelines.vertex._CONTEXT_LOOKS", 1)
    done = run("submit", environment | {"EXPERIMENT": "small-models"}, "vertex")
    assert done.returncode == 1
    assert "submitted projects/" in done.stdout
    message = "the run goes on, but is not in EXPERIMENT=small-models: Vertex AI keeps no metadata"
    assert last_message(done).startswith(message)


BOARD = "projects/p/locations/europe-west4/tensorboards/1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TENSORBOARD": "board"}, "TENSORBOARD='board' must be projects/P/locations/L/tensorb"),
        ({"REGION": "us-central1"}, "is in europe-west4, but REGION=us-central1; make them agree"),
        ({"SERVICE_ACCOUNT": ""}, "without SERVICE_ACCOUNT, which its jobs need; give both"),
    ],
)
def test_a_tensorboard_that_cannot_work_is_told_before_anything_is_sent(
    vertex: Loopback, environment: dict[str, str], change: dict[str, str], message: str
) -> None:
    done = run("submit", environment | {"TENSORBOARD": BOARD} | change, "vertex")
    assert done.returncode == 2
    assert message in last_message(done)
    assert vertex.requests == []


def test_caching_is_on_unless_switched_off(vertex: Loopback, environment: dict[str, str]) -> None:
    assert run("submit", environment, "vertex").returncode == 0
    tasks = every_task(vertex.requests[-1][2]["pipelineSpec"])
    assert {task["cachingOptions"]["enableCache"] for task in tasks.values()} == {True}


def test_waiting_follows_to_the_end(vertex: Loopback, environment: dict[str, str]) -> None:
    done = run("submit", environment | {"WAIT": "1"}, "vertex")
    assert done.returncode == 0, done.stderr
    assert "prepare: succeeded" in done.stdout
    assert done.stdout.index("anneal: running") < done.stdout.index("anneal: succeeded")
    assert "run: succeeded" in done.stdout
    # A loop's rounds are one stage; neither the loop itself nor the run is one
    assert done.stdout.count("teacher-targets: running") == 1
    assert done.stdout.count(": succeeded") == 4
    assert "not_triggered" not in done.stdout


def test_who_stops_waiting_is_told_that_the_run_goes_on(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    vertex.looks = -1000
    following = subprocess.Popen(
        [sys.executable, "-m", "pipelines.submit", "vertex"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=around(environment | {"WAIT": "1"}),
        preexec_fn=with_interrupts,
    )
    assert following.stdout is not None
    while "anneal: running" not in following.stdout.readline():
        assert following.poll() is None
    following.send_signal(signal.SIGINT)
    _, errors = following.communicate(timeout=60)
    assert following.returncode == 130
    assert "no longer followed; the run goes on" in errors


def test_a_run_that_fails_ends_with_status_1(vertex: Loopback, environment: dict[str, str]) -> None:
    done = run("submit", environment | {"WAIT": "1", "LABELS": "ends=failed"}, "vertex")
    assert done.returncode == 1
    assert last_message(done) == "the run ended as failed; failed: anneal"


@pytest.mark.parametrize(
    ("code", "said", "why"),
    [
        (
            8,
            "Resources are insufficient in region: europe-west4. Try a different region.",
            "it has no such machine free",
        ),
        (
            9,
            "code=RESOURCE_EXHAUSTED, message=The following quota metrics exceed quota limits: x",
            "its quota is used up",
        ),
        (13, "the replica ended with status 1", ""),
    ],
)
def test_a_run_that_got_no_machine_says_how_to_run_it_elsewhere(
    vertex: Loopback, environment: dict[str, str], code: int, said: str, why: str
) -> None:
    vertex.task_error = {"code": code, "message": said}
    done = run("submit", environment | {"WAIT": "1", "LABELS": "ends=failed"}, "vertex")
    assert done.returncode == 1
    message = last_message(done)
    (name,) = vertex.jobs
    expected = (
        f"; anneal did not get its machine in europe-west4, since {why} ({said})" if why else ""
    )
    assert message.startswith(f"the run ended as failed; failed: anneal{expected}")
    advice = f"make rerun RUN={name.rpartition('/')[2]} STAGE=anneal ANNEAL_MACHINES="
    assert (advice in message) == bool(why)


def test_a_dry_run_sends_nothing_and_needs_no_credentials(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    del environment["GOOGLE_APPLICATION_CREDENTIALS"]
    done = run("submit", environment | {"DRY_RUN": "1", "JSON": "1", "PARAMS": "seed=7"}, "vertex")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert request["pipelineJob"]["runtimeConfig"]["parameterValues"] == {"seed": 7}
    assert request["pipelineJob"]["serviceAccount"] == SERVICE_ACCOUNT
    assert vertex.requests == []


def test_what_is_missing_is_named_at_once_before_anything_is_sent(
    vertex: Loopback, environment: dict[str, str], tmp_path: Path
) -> None:
    for name in ("PROJECT", "PIPELINE_ROOT", "TRAINER_IMAGE"):
        del environment[name]
    done = run_process("submit", environment, "vertex", cwd=tmp_path)
    assert done.returncode == 2
    message = last_message(done)
    assert all(name in message for name in ("PROJECT", "PIPELINE_ROOT", "TRAINER_IMAGE"))
    assert "REGION" not in message.split("Set")[0]
    assert vertex.requests == []


@pytest.mark.parametrize(
    ("status", "name", "text", "expected"),
    [
        (
            403,
            "PERMISSION_DENIED",
            "aiplatform.pipelineJobs.create",
            "permission denied in project",
        ),
        (429, "RESOURCE_EXHAUSTED", "Quota exceeded for A100", "quota exhausted in europe-west4"),
        (401, "UNAUTHENTICATED", "invalid credentials", "not authenticated with Google Cloud"),
        (404, "NOT_FOUND", "no such project", "not found at localhost"),
        (400, "INVALID_ARGUMENT", "bad label", "answered: bad label"),
    ],
)
def test_refusals_are_one_line(
    vertex: Loopback,
    environment: dict[str, str],
    status: int,
    name: str,
    text: str,
    expected: str,
) -> None:
    vertex.refusal = (status, name, text)
    done = run("submit", environment, "vertex")
    assert done.returncode == 1
    message = last_message(done)
    assert expected in message
    assert text in message


def test_a_run_is_followed_over_outages(
    vertex: Loopback, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_PATIENCE", 2)
    vertex.outages = 2
    done = run("submit", environment | {"WAIT": "1"}, "vertex")
    assert done.returncode == 0, done.stderr
    assert "run: succeeded" in done.stdout
    vertex.outages = 1000
    done = run("submit", environment | {"WAIT": "1"}, "vertex")
    assert done.returncode == 1
    assert "restarting; the run goes on: https://console.cloud.google.com/" in last_message(done)


def test_something_that_is_not_vertex_answers(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    vertex.page = (200, {"Content-Type": "application/json"}, "{}")
    environment = environment | {"GOOGLE_APPLICATION_CREDENTIALS": ""}
    done = run("submit", environment, "vertex")
    assert done.returncode == 1
    last_message(done)


def test_a_region_that_is_none(vertex: Loopback, environment: dict[str, str]) -> None:
    done = run("submit", environment | {"REGION": "mars"}, "vertex")
    assert done.returncode == 2
    assert last_message(done).startswith("REGION='mars': ")
    assert vertex.requests == []


def test_parameters_are_checked_before_anything_is_sent(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    for params, machines, expected in (
        ("anneal_alpha=2", {}, "stage anneal: anneal_alpha=2 must be between 0 and 1"),
        ("", {"ANNEAL_REPLICAS": "16"}, "not divisible by micro_batch 8 x 16 processes"),
        ("", {"ANNEAL_MACHINE_TYPE": "g2-standard-12"}, "without ANNEAL_ACCELERATOR_TYPE"),
        ("resume_gcs_uri=/home/me/x.pt", {}, "resume_gcs_uri='/home/me/x.pt': no stage can read"),
        ("resume_gcs_uri=gs://b", {}, "copy it to gs://BUCKET/NAME"),
        ("dataset_name=~", {}, "dataset_name='~' is on this machine, where no stage can read it"),
        ("dataset_name=gs://b/text", {}, "give both, as dataset_config= where there is none"),
        ("hf_secret_name=mine", {}, "write projects/P/secrets/S[/versions/V]"),
        ("export=false", {"MODEL_NAME": "a"}, "leaves nothing to register as MODEL_NAME=a"),
        ("", {"MODEL_NAME": "a"}, "MODEL_NAME='a' without SERVING_IMAGE"),
    ):
        done = run("submit", environment | machines | {"PARAMS": params}, "vertex")
        assert done.returncode == 2
        assert expected in last_message(done)
    assert vertex.requests == []


def test_absent_credentials(vertex: Loopback, environment: dict[str, str], tmp_path: Path) -> None:
    absent = environment | {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "absent.json")}
    done = run("submit", absent, "vertex")
    assert done.returncode == 1
    assert "not authenticated with Google Cloud" in last_message(done)
    assert vertex.requests == []


def test_an_unreachable_endpoint(vertex: Loopback, environment: dict[str, str]) -> None:
    done = run("submit", environment | {"API_ENDPOINT": "localhost:9"}, "vertex")
    assert done.returncode == 1
    assert last_message(done).startswith("localhost:9 cannot be reached")


# ── rerun


OLD_TITLES = {
    "train": "anneal-512",
    "pick-best": "pick-best-512",
    "train-2": "continue-1024",
    "pick-best-2": "pick-best-1024",
}
"""By task, what earlier releases called a stage otherwise."""


def finished_run(
    vertex: Loopback,
    environment: dict[str, str],
    titles: Mapping[str, str] | None = None,
    *,
    teacher: str = "online",
) -> str:
    """Submit, and let every task of the run have succeeded; returns the run's id.

    With ``titles``, as an earlier release would have submitted it, which had other ones.
    """
    params = f"seed=7 teacher={teacher}" if teacher != "online" else "seed=7"
    assert run("submit", environment | {"PARAMS": params}, "vertex").returncode == 0
    (submitted,) = vertex.jobs
    # A repetition within the same second would have its id
    name = f"{PARENT}/liquid-annealing-20250304050607"
    job = vertex.jobs[name] = vertex.jobs.pop(submitted) | {"name": name}
    spec = job["pipelineSpec"]
    for key, title in (titles or {}).items():
        spec["root"]["dag"]["tasks"][key]["taskInfo"]["name"] = title
    # Vertex AI lists the run itself among its tasks, and what is inside of some below them
    details = [{"taskId": "99", "taskName": name.rpartition("/")[2], "state": "SUCCEEDED"}]
    add_details(details, spec, spec["root"]["dag"], parent="99", teacher=teacher)
    job["jobDetail"] = {"taskDetails": details}
    job["labels"] = {"vertex-ai-pipelines-run-billing-id": "123"}
    return name.rpartition("/")[2]


TEACHER_TASKS = ("condition-branches-1", "condition-3", "condition-4", "for-loop-2")
TEACHER_TASKS += ("plan-targets", "teacher-targets", "join-targets", "no-targets")
"""What decides on the teacher, and all that is inside of it."""
EXPORT_TASKS = ("condition-5", "export-hf", "condition-6", "lm-eval-tasks")
"""What decides on the export and on tasks of lm-eval, of which a run has none by default."""


def skips(body: Mapping[str, Any]) -> dict[str, set[bool]]:
    """By a task's key: whether it is skipped; of a loop's, whether its rounds are."""
    found: dict[str, set[bool]] = {}
    for config in body["pipelineTaskRerunConfigs"]:
        key = config["taskName"].removeprefix("unique-")
        found.setdefault(key, set()).add(config.get("skipTask", False))
    return found


def add_details(
    details: list[dict[str, str]],
    spec: Mapping[str, Any],
    dag: Mapping[str, Any],
    *,
    parent: str,
    teacher: str,
) -> None:
    """What Vertex AI says of the tasks of a pipeline, a condition or a loop of two rounds."""
    for key, task in dag["tasks"].items():
        title = task["taskInfo"]["name"]
        untaken = title in {"cached", "online", "benchmarks"} - {teacher}
        number = str(100 + len(details))
        details.append(
            {
                "taskId": number,
                "parentTaskId": parent,
                "taskName": title,
                "taskUniqueName": f"unique-{key}",
                "state": "NOT_TRIGGERED" if untaken else "SUCCEEDED",
            }
        )
        inside = spec["components"][task["componentRef"]["name"]].get("dag")
        for _ in range(0 if inside is None else 2 if "parameterIterator" in task else 1):
            first = len(details)
            add_details(details, spec, inside, parent=number, teacher=teacher)
            for detail in details[first:] if untaken else ():
                detail["state"] = "NOT_TRIGGERED"


def test_rerun_repeats_a_stage_and_what_follows(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment)
    vertex.requests.clear()
    given = {"RUN": original, "STAGE": "continue", "PARAMS": "continue_train_steps=8000"}
    done = run_process("rerun", environment | given)
    assert done.returncode == 0, done.stderr
    (request,) = [entry for entry in vertex.requests if entry[0] == "POST"]
    _, path, body = request
    assert path.startswith(f"/v1beta1/{PARENT}?")
    assert body["originalPipelineJobId"] == "123"
    assert body["runtimeConfig"]["parameterValues"] == {"seed": 7, "continue_train_steps": 8000}
    assert skips(body) == {
        "prepare-tokens": {True},
        **{key: {True} for key in TEACHER_TASKS},
        "train": {True},
        "pick-best": {True},
        "resize-reset": {True},
        "train-2": {False},
        "pick-best-2": {False},
        "evaluate": {False},
        **{key: {False} for key in EXPORT_TASKS},
    }
    assert body["serviceAccount"] == SERVICE_ACCOUNT
    assert "runs again: " in done.stdout


def test_rerun_of_an_earlier_release_goes_by_its_own_titles(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment | {"CONTINUE_REPLICAS": "2"}, OLD_TITLES)
    given = environment | {"RUN": original, "STAGE": "continue-1024"}
    done = run("rerun", given)
    assert done.returncode == 0, done.stderr
    assert "runs again: continue-1024, pick-best-1024, export, evaluate\n" in done.stdout
    # The two processes of its custom job are counted, whatever its title
    done = run("rerun", given | {"PARAMS": "continue_grad_accum=0 continue_micro_batch=64"})
    assert done.returncode == 2
    assert "not divisible by micro_batch 64 x 2 processes" in last_message(done)


def test_rerun_skips_what_came_from_the_cache(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment)
    for detail in next(iter(vertex.jobs.values()))["jobDetail"]["taskDetails"]:
        if detail["taskName"] in ("prepare", "anneal"):
            detail["state"] = "SKIPPED"
    given = {"RUN": original, "STAGE": "continue", "CACHE": "0"}
    done = run("rerun", environment | given)
    assert done.returncode == 0, done.stderr
    assert "runs again: continue, pick-best-continued, export, evaluate\n" in done.stdout
    body = vertex.requests[-1][2]
    skipped = {key for key, skipping in skips(body).items() if skipping == {True}}
    assert skipped == {"prepare-tokens", "train", "pick-best", "resize-reset", *TEACHER_TASKS}
    done = run("rerun", environment | given | {"PARAMS": "anneal_train_steps=9"})
    assert done.returncode == 2
    assert "read by anneal, which would be skipped" in last_message(done)


def test_rerun_repeats_what_failed_before_the_stage_too(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment)
    details = next(iter(vertex.jobs.values()))["jobDetail"]["taskDetails"]
    for detail in details:
        if detail["taskName"] in ("resize-and-reset", "evaluate"):
            detail["state"] = "FAILED"
    done = run("rerun", environment | {"RUN": original, "STAGE": "evaluate"})
    assert done.returncode == 0, done.stderr
    assert "runs again: resize-and-reset, evaluate" in done.stdout


def test_rerun_keeps_the_labels_of_the_original(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment)
    next(iter(vertex.jobs.values()))["labels"] |= {"cost-center": "7", "team": "old"}
    page = f"https://console.cloud.google.com/vertex-ai/locations/europe-west4/pipelines/runs/{original}"
    page += "?hl=en&project=p"
    done = run("rerun", environment | {"RUN": page, "STAGE": "evaluate"})
    assert done.returncode == 0, done.stderr
    assert vertex.requests[-1][2]["labels"] == {"cost-center": "7", "team": "small-models"}


def test_rerun_keeps_the_account_and_network_of_the_original(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    """Its custom jobs carry them too."""
    given = {"RUN": finished_run(vertex, environment), "STAGE": "evaluate"}
    done = run("rerun", environment | given | {"SERVICE_ACCOUNT": "other@p.iam", "NETWORK": ""})
    assert done.returncode == 0, done.stderr
    body = vertex.requests[-1][2]
    assert (body["serviceAccount"], body["network"]) == (SERVICE_ACCOUNT, NETWORK)
    kept = f"SERVICE_ACCOUNT=other@p.iam is not used: a repetition keeps {SERVICE_ACCOUNT}"
    assert kept in done.stdout
    assert "NETWORK" not in done.stdout


def test_rerun_on_other_machines(vertex: Loopback, environment: dict[str, str]) -> None:
    original = finished_run(vertex, environment)
    before = pools_of(vertex.requests[-1][2]["pipelineSpec"])
    listed = "a2-ultragpu-2g:NVIDIA_A100_80GB:2, g2-standard-8:NVIDIA_L4:1"
    moved = {"CONTINUE_MACHINES": listed, "CONTINUE_SCHEDULING": "flex_start"}
    # Those of what is skipped do not count
    moved |= {"ANNEAL_SCHEDULING": "spot", "CONTINUE_MAX_WAIT_HOURS": "3"}
    given = environment | {"RUN": original, "STAGE": "continue"}
    done = run("rerun", given | moved)
    assert done.returncode == 0, done.stderr
    assert (
        "continue runs on a2-ultragpu-2g (2 x NVIDIA_A100_80GB, flex_start), before on"
        " a2-highgpu-1g (1 x NVIDIA_TESLA_A100, standard)\n"
    ) in done.stdout
    assert "\ncontinue             a2-ultragpu-2g, 2 A100, flex_start " in done.stdout
    assert "note: continue is on machines of flex_start, counted at the price on" in done.stdout
    spec = vertex.requests[-1][2]["pipelineSpec"]
    pools = pools_of(spec)
    assert {title for title in pools if pools[title] != before[title]} == {"continue"}
    (pool,) = pools["continue"]
    assert pool["machine_spec"] == {
        "machine_type": "a2-ultragpu-2g",
        "accelerator_type": "NVIDIA_A100_80GB",
        "accelerator_count": 2,
    }
    assert {"name": "EXPECTED_GPUS", "value": "2"} in pool["container_spec"]["env"]
    job = jobs_of(spec)["continue"]
    assert (job.value("strategy"), job.value("max_wait_duration")) == ("FLEX_START", "10800s")
    done = run("rerun", given | {"CONTINUE_MACHINES": "a2-highgpu-1g:NVIDIA_L4:1"})
    assert done.returncode == 2
    assert "CONTINUE_MACHINE_TYPE=a2-highgpu-1g carries 1 x" in last_message(done)


def test_rerun_without_the_cache(vertex: Loopback, environment: dict[str, str]) -> None:
    given = {"RUN": finished_run(vertex, environment), "STAGE": "continue", "CACHE": "0"}
    done = run("rerun", environment | given)
    assert done.returncode == 0, done.stderr
    tasks = every_task(vertex.requests[-1][2]["pipelineSpec"])
    cached = {key for key, task in tasks.items() if task["cachingOptions"].get("enableCache")}
    assert cached == {"prepare-tokens", "train", "pick-best", "resize-reset"} | {
        key for key in TEACHER_TASKS if key.endswith("-targets")
    }


def test_rerun_repeats_what_makes_the_targets_as_a_whole(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    """Its workers come from the cache, but for those that are to be made again."""
    original = finished_run(vertex, environment, teacher="cached")
    given = environment | {"RUN": original}
    done = run("rerun", given | {"STAGE": "join-targets"})
    assert done.returncode == 0, done.stderr
    listed = "plan-targets, teacher-targets, join-targets, anneal, pick-best-annealed, "
    assert f"runs again: {listed}" in done.stdout
    body = vertex.requests[-1][2]
    assert [key for key, skipping in skips(body).items() if skipping != {False}] == [
        "prepare-tokens"
    ]
    tasks = every_task(body["pipelineSpec"])
    assert tasks["teacher-targets"]["cachingOptions"] == {"enableCache": True}
    done = run("rerun", given | {"STAGE": "continue", "PARAMS": "target_bytes=32"})
    assert done.returncode == 2
    assert "read by plan-targets, which would be skipped" in last_message(done)


def test_rerun_repeats_all_shares_where_one_failed(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    original = finished_run(vertex, environment, teacher="cached")
    details = next(iter(vertex.jobs.values()))["jobDetail"]["taskDetails"]
    around = {"teacher-targets", "shares", "cached", "condition-branches-1", "join-targets"}
    for detail in details:
        if detail["taskName"] in around:
            detail["state"] = "FAILED"
    next(d for d in details if d["taskName"] == "teacher-targets")["state"] = "SUCCEEDED"
    done = run("rerun", environment | {"RUN": original, "STAGE": "evaluate"})
    assert done.returncode == 0, done.stderr
    assert "runs again: plan-targets, teacher-targets, join-targets, evaluate\n" in done.stdout
    skipping = skips(vertex.requests[-1][2])
    assert all(skipping[key] == {False} for key in TEACHER_TASKS)


def test_rerun_with_the_other_form_of_the_teacher(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    given = {"RUN": finished_run(vertex, environment), "PARAMS": "teacher=cached"}
    done = run("rerun", environment | given | {"STAGE": "anneal"})
    assert done.returncode == 2
    assert "teacher is read by plan-targets" in last_message(done)
    done = run("rerun", environment | given | {"STAGE": "teacher-targets"})
    assert done.returncode == 0, done.stderr
    assert "teacher-targets, join-targets, " in done.stdout
    assert skips(vertex.requests[-1][2])["condition-branches-1"] == {False}


def test_a_dry_rerun_prints_the_request_and_sends_none(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    given = {
        "RUN": finished_run(vertex, environment),
        "STAGE": "evaluate",
        "DRY_RUN": "1",
        "JSON": "1",
    }
    vertex.requests.clear()
    done = run("rerun", environment | given | {"PARAMS": "eval_ctx_lens=1024"})
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout)
    assert request["originalPipelineJobId"] == "123"
    assert request["runtimeConfig"]["parameterValues"] == {"seed": 7, "eval_ctx_lens": "1024"}
    assert [method for method, _, _ in vertex.requests] == ["GET"]
    assert "note: eval_ctx_lens changes for what runs again, not for what is skipped" in done.stderr


def test_rerun_errors(vertex: Loopback, environment: dict[str, str]) -> None:
    original = finished_run(vertex, environment)
    vertex.requests.clear()
    known = {"RUN": original, "STAGE": "continue"}
    page = "https://console.cloud.google.com/vertex-ai/locations/{}/pipelines/runs/a?project={}"
    for given, status, expected in (
        ({}, 2, "missing: RUN (a run's id, full name or page); STAGE (the stage to repeat"),
        ({"STAGE": "evaluate"}, 2, "missing: RUN"),
        (known | {"WAIT": "yes"}, 2, "WAIT='yes': 1 or 0 is needed"),
        (known | {"RUN": "My Run"}, 2, "RUN='My Run' is no run's id"),
        (
            {"RUN": f"{PARENT}/liquid-search-2025", "STAGE": "rank"},
            2,
            "liquid-search-2025 is a sea",
        ),
        (known | {"STAGE": "continue-102"}, 2, "did you mean continue? It has prepare, plan"),
        (known | {"PARAMS": "anneal_seed=1"}, 2, "unknown parameter 'anneal_seed'"),
        (known | {"PARAMS": "anneal_train_steps=9"}, 2, "skipped; give STAGE=anneal"),
        (
            known | {"PARAMS": "continue_alpha=2"},
            2,
            "stage continue: continue_alpha=2 must be between",
        ),
        (known | {"PARAMS": "continue_grad_accum=0 continue_micro_batch=7"}, 2, "by micro_batch 7"),
        (known | {"RUN": "absent"}, 1, "not found at localhost"),
        (known | {"RUN": page.format("us-east1", "p")}, 2, "is in us-east1, but REGION=europe-we"),
        (known | {"RUN": page.format("europe-west4", "q")}, 2, "is in q, but PROJECT=p"),
        (known | {"RUN": "projects/1/locations/us-east1/pipelineJobs/a"}, 2, "is in us-east1"),
        (known | {"RUN": "projects/1/locations/europe-west4/pipelineJobs/a"}, 1, "not found"),
    ):
        done = run("rerun", environment | given)
        assert done.returncode == status, done.stderr
        assert expected in last_message(done)
    assert {method for method, _, _ in vertex.requests} == {"GET"}


def test_a_stage_that_no_release_has_is_refused_before_anything_is_asked(
    vertex: Loopback, environment: dict[str, str]
) -> None:
    for stage, hint in (("foo", "it has prepare"), ("contnue", "did you mean continue? It has")):
        done = run("rerun", environment | {"RUN": "liquid-annealing-1", "STAGE": stage})
        assert done.returncode == 2
        assert f"STAGE={stage!r} is not in the pipeline; {hint}" in last_message(done)
    assert vertex.requests == []


# ── open-source Kubeflow Pipelines


def test_submission_to_kubeflow(kubeflow: Loopback) -> None:
    given = {
        "HOST": kubeflow.url,
        "TRAINER_IMAGE": IMAGE,
        "PARAMS": "seed=7",
        "WAIT": "1",
        "PIPELINE_ROOT": "gs://bucket/root",
    }
    done = run_process("submit", given, "kfp")
    assert done.returncode == 0, done.stderr
    assert f"{kubeflow.url}/#/runs/details/r1" in done.stdout
    assert "run: succeeded" in done.stdout
    (body,) = [
        body
        for method, path, body in kubeflow.requests
        if method == "POST" and path.startswith("/apis/v2beta1/runs")
    ]
    assert body["runtime_config"]["parameters"] == {"seed": 7}
    assert body["runtime_config"]["pipeline_root"] == "gs://bucket/root"
    spec = body["pipeline_spec"]
    spec = spec.get("pipeline_spec", spec)
    executors = spec["deploymentSpec"]["executors"]
    resources = executors["exec-train"]["container"]["resources"]
    assert resources["accelerator"] == {
        "count": "1",
        "resourceCount": "1",
        "resourceType": "nvidia.com/gpu",
        "type": "nvidia.com/gpu",
    }
    assert executors["exec-train"]["container"]["image"] == IMAGE


def test_a_kubeflow_of_several_users(kubeflow: Loopback, tmp_path: Path) -> None:
    kubeflow.multi_user = True
    given = {"HOST": kubeflow.url, "TRAINER_IMAGE": IMAGE, "HOME": str(tmp_path)}
    done = run_process("submit", given, "kfp")  # the client remembers a namespace at home
    assert done.returncode == 2
    assert last_message(done).startswith("missing: NAMESPACE (your profile's: http://localhost:")
    assert [method for method, _, _ in kubeflow.requests if method == "POST"] == []
    done = run("submit", given | {"NAMESPACE": "ada"}, "kfp")
    assert done.returncode == 0, done.stderr
    kubeflow.multi_user = False
    done = run("submit", given | {"NAMESPACE": "ada"}, "kfp")
    assert done.returncode == 0, "a server of one user takes no namespace"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CMEK_KEY", "CMEK_KEY is for Vertex AI"),
        ("NETWORK", "NETWORK is for Vertex AI"),
        ("TENSORBOARD", "TENSORBOARD is for Vertex AI"),
        ("SERVICE_ACCOUNT", "is one of Google Cloud; give the name of a Kubernetes service"),
    ],
)
def test_settings_that_kubeflow_would_drop(kubeflow: Loopback, name: str, message: str) -> None:
    values = {"CMEK_KEY": KEY, "NETWORK": NETWORK, "SERVICE_ACCOUNT": SERVICE_ACCOUNT}
    values["TENSORBOARD"] = BOARD
    given = {"HOST": kubeflow.url, "TRAINER_IMAGE": IMAGE, name: values[name]}
    done = run("submit", given, "kfp")
    assert done.returncode == 2
    assert message in last_message(done)
    assert kubeflow.requests == []


def test_a_dry_run_for_kubeflow_prints_all_that_would_be_sent(kubeflow: Loopback) -> None:
    given = {
        "HOST": kubeflow.url,
        "TRAINER_IMAGE": IMAGE,
        "DRY_RUN": "1",
        "CACHE": "0",
        "JSON": "1",
    }
    given |= {"EXPERIMENT": "e", "NAMESPACE": "ns", "SERVICE_ACCOUNT": "sa", "PARAMS": "seed=7"}
    done = run("submit", given, "kfp")
    assert done.returncode == 0, done.stderr
    request = json.loads(done.stdout.partition("---")[0])
    assert request["host"] == kubeflow.url
    assert request["arguments"] == {"seed": 7}
    names = ("experiment_name", "namespace", "service_account", "enable_caching")
    assert [request[name] for name in names] == ["e", "ns", "sa", False]
    assert "pipelineInfo:" in done.stdout
    assert kubeflow.requests == []


@pytest.mark.parametrize("missing", [("HOST",), ("TRAINER_IMAGE",), ("HOST", "TRAINER_IMAGE")])
def test_what_kubeflow_misses_is_named_at_once(
    kubeflow: Loopback, tmp_path: Path, missing: tuple[str, ...]
) -> None:
    (tmp_path / "none.yaml").write_text("")
    given = {"TRAINER_IMAGE": IMAGE, "HOST": kubeflow.url}
    given["SETTINGS"] = str(tmp_path / "none.yaml")
    for name in missing:
        del given[name]
    done = run("submit", given, "kfp")
    assert done.returncode == 2
    named = last_message(done).partition(". Set")[0]
    assert {name for name in ("HOST", "TRAINER_IMAGE") if f"{name} (" in named} == set(missing)
    assert kubeflow.requests == []


def test_kubeflow_refuses(kubeflow: Loopback) -> None:
    given = {"TRAINER_IMAGE": IMAGE, "HOST": kubeflow.url, "KFP_TOKEN": "token-for-kubeflow"}
    kubeflow.refusal = (403, "PERMISSION_DENIED", "robot may not create runs")
    done = run("submit", given, "kfp")
    assert done.returncode == 1
    message = last_message(done)
    assert "refused the run: 403 Forbidden: robot may not create runs; check KFP_TOKEN" in message
    assert "token-for-kubeflow" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ((302, {"Location": "https://login.example/in"}, ""), "redirects to https://login.example"),
        ((200, {"Content-Type": "text/html"}, "<html>"), "but not as Kubeflow Pipelines does"),
        ((502, {}, "<html>bad gateway"), "refused the run: 502 Bad Gateway"),
    ],
)
def test_something_else_answers(
    kubeflow: Loopback, page: tuple[int, dict[str, str], str], message: str
) -> None:
    kubeflow.page = page
    done = run("submit", {"TRAINER_IMAGE": IMAGE, "HOST": kubeflow.url}, "kfp")
    assert done.returncode == 1
    assert message in last_message(done)


@pytest.mark.parametrize(
    ("host", "status", "message"),
    [("http://localhost:9", 1, "cannot be reached"), ("localhost:9", 2, "must start with http://")],
)
def test_an_unreachable_kubeflow(host: str, status: int, message: str) -> None:
    done = run("submit", {"TRAINER_IMAGE": IMAGE, "HOST": host}, "kfp")
    assert done.returncode == status
    assert message in last_message(done)


def test_a_kubeflow_run_is_followed_over_outages(
    kubeflow: Loopback, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "_PATIENCE", 2)
    given = {"TRAINER_IMAGE": IMAGE, "HOST": kubeflow.url, "WAIT": "1", "POLL_SECONDS": "1"}
    kubeflow.outages, kubeflow.run_state = 2, "CANCELED"
    done = run("submit", given, "kfp")
    assert done.returncode == 1
    assert last_message(done) == "the run ended as canceled"
    kubeflow.outages = 1000
    done = run("submit", given, "kfp")
    assert done.returncode == 1
    assert f"503 Service Unavailable: restarting; the run goes on: {kubeflow.url}/#/runs" in (
        last_message(done)
    )
