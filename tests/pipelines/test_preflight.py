"""The checks before a submission, by the real clients, against loopback services."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from tests.pipelines.google_services import (
    GoogleServices,
    Rules,
    disabled,
    quota,
    refusal,
)
from tests.pipelines.test_submit import IMAGE, around, finished_run, last_message, pools_of, run

STAGES = "stages@p.iam.gserviceaccount.com"
ROLE = {"includedPermissions": ["storage.objects.get", "storage.objects.list"]}
WRITER = {"includedPermissions": ["storage.objects.create", "storage.objects.delete"]}
STARTING = ["aiplatform.customJobs.create", "aiplatform.customJobs.get"]
DENIED = refusal(403, "PERMISSION_DENIED", "denied")
NO_TOKEN: Rules = {"generateAccessToken": DENIED}


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServices]:
    server = GoogleServices(tmp_path_factory.mktemp("services"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GoogleServices]:
    server = GoogleServices(tmp_path_factory.mktemp("hub"), tls=False)
    yield server
    server.close()


@pytest.fixture(scope="module")
def key(services: GoogleServices, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return services.service_account(tmp_path_factory.mktemp("key") / "key.json")


@pytest.fixture
def environment(services: GoogleServices, hub: GoogleServices, key: Path) -> dict[str, str]:
    services.rules, hub.rules = {}, {}
    services.requests.clear()
    services.jobs.clear()
    return services.overrides() | {
        "PROJECT": "p",
        "REGION": "europe-west4",
        "PIPELINE_ROOT": "gs://artifacts/runs",
        "TRAINER_IMAGE": IMAGE,
        "SERVICE_ACCOUNT": STAGES,
        "GOOGLE_APPLICATION_CREDENTIALS": str(key),
        "HF_ENDPOINT": hub.url,
        "POLL_SECONDS": "1",
    }


class Situation(NamedTuple):
    """What is otherwise than well, and the line that says so."""

    name: str
    line: str
    rules: Rules = MappingProxyType({})
    changes: Mapping[str, str] = MappingProxyType({})


def bound(role: str, member: str = f"serviceAccount:{STAGES}", **more: Any) -> dict[str, Any]:
    return {"role": role, "members": [member], **more}


def policy(*bindings: dict[str, Any]) -> tuple[int, Any]:
    return 200, {"version": 3, "bindings": list(bindings)}


ROLES: Rules = {
    "roles/storage.objectViewer": (200, ROLE),
    "roles/storage.writer": (200, WRITER),
    "roles/editor": (200, {"includedPermissions": ["artifactregistry.x"]}),
    "roles/storage.legacyBucketOwner": (200, WRITER),
}
BUCKET_POLICY = "GET /storage/v1/b/artifacts/iam\\?"
PROJECT_POLICY = "cloudresourcemanager/.*getIamPolicy"
SITUATIONS = [
    # project and services
    Situation(
        "project: absent",
        "FAILED project: there is no project 'p' that your account may see; run: gcloud pr",
        {"cloudresourcemanager/v1/projects/p$": DENIED},
    ),
    Situation(
        "project: deleted",
        "FAILED project: p is delete_requested; run: gcloud projects undelete p",
        {"cloudresourcemanager/v1/projects/p$": (200, {"lifecycleState": "DELETE_REQUESTED"})},
    ),
    Situation(
        "project: service disabled",
        "? project: could not be checked: cloudresourcemanager.googleapis.com is not enabled in"
        " project p; run: gcloud services enable cloudresourcemanager.googleapis.com --project=p",
        {"cloudresourcemanager/v1/projects/p$": disabled("cloudresourcemanager")},
    ),
    Situation(
        "services: one is disabled",
        "FAILED services: artifactregistry.googleapis.com is not enabled; run: gcloud services"
        " enable artifactregistry.googleapis.com --project=p",
        {
            "batchGet": (
                200,
                {
                    "services": [
                        {"name": f"projects/12/services/{n}.googleapis.com", "state": state}
                        for n, state in (
                            ("aiplatform", "ENABLED"),
                            ("storage", "ENABLED"),
                            ("artifactregistry", "DISABLED"),
                        )
                    ]
                },
            )
        },
    ),
    Situation(
        "services: throttled",
        "? services: could not be checked: the service wants fewer requests for now; try again",
        {"batchGet": refusal(429, "RESOURCE_EXHAUSTED", "slow down")},
    ),
    Situation(
        "services: unreachable",
        "? services: could not be checked: the service cannot be reached",
        changes={"CLOUDSDK_API_ENDPOINT_OVERRIDES_SERVICEUSAGE": "https://localhost:9/"},
    ),
    Situation(
        "services: garbage",
        "? services: could not be checked: the service answered nonsense",
        {"batchGet": (200, "<html>a login page</html>")},
    ),
    Situation(
        "services: an empty answer",
        "? services: could not be checked: the service answered nonsense (no service, of those",
        {"batchGet": (200, {})},
    ),
    # who asks
    Situation(
        "runs: not allowed",
        "FAILED runs: your account lacks aiplatform.pipelineJobs.create; run: gcloud projects"
        " add-iam-policy-binding p --condition=None --member=serviceAccount:robot@p.iam.gservice",
        {"v1/projects/p:testIamPerm": (200, {"permissions": ["aiplatform.pipelineJobs.get"]})},
    ),
    Situation(
        "runs: Vertex AI disabled",
        "FAILED runs: aiplatform.googleapis.com is not enabled in project p; run: gcloud"
        " services enable aiplatform.googleapis.com --project=p",
        {"GET /v1/projects/p/locations": disabled("aiplatform")},
    ),
    Situation(
        "runs: Vertex AI is down",
        "? runs: could not be checked: the service is down",
        {"GET /v1/projects/p/locations": refusal(503, "UNAVAILABLE", "restarting")},
    ),
    Situation(
        "service account: absent",
        f"FAILED service account: {STAGES} does not exist; run: gcloud iam service-accounts create"
        " stages --project=p",
        {f"iam/v1/projects/-/serviceAccounts/{STAGES}$": refusal(404, "NOT_FOUND", "absent")},
    ),
    Situation(
        "service account: disabled",
        f"FAILED service account: {STAGES} is disabled; run: gcloud iam service-accounts enable",
        {f"iam/v1/projects/-/serviceAccounts/{STAGES}$": (200, {"disabled": True})},
    ),
    Situation(
        "service account: not to be used",
        f"FAILED service account: your account may not let runs use {STAGES}; run: gcloud iam"
        f" service-accounts add-iam-policy-binding {STAGES} --project=p --member=serviceAccount:r",
        {"iam/v1/.*:testIamPermissions": (200, {})},
    ),
    Situation(
        "job rights: none to act as itself",
        f"FAILED job rights: {STAGES} may not use itself for them (it lacks iam.serviceAccounts."
        f"actAs); run: gcloud iam service-accounts add-iam-policy-binding {STAGES}",
        {"iam/v1/.*:testIamPermissions": (200, {})},
    ),
    Situation(
        "job rights: none to start jobs",
        f"FAILED job rights: {STAGES} may not use custom jobs of project p (it lacks aiplatform."
        "customJobs.create); run: gcloud projects add-iam-policy-binding p"
        f" --condition=None --member=serviceAccount:{STAGES} --role=roles/aiplatform.user",
        {
            "v1/projects/p:testIamPerm": (
                200,
                {
                    "permissions": [
                        "aiplatform.customJobs.get",
                        "aiplatform.pipelineJobs.create",
                        "aiplatform.pipelineJobs.get",
                    ]
                },
            )
        },
    ),
    Situation(
        "job rights: by policies",
        f"ok job rights: the policies let {STAGES} use custom jobs of project p",
        {
            **NO_TOKEN,
            "roles/aiplatform.user": (200, {"includedPermissions": STARTING}),
            "roles/iam.user": (200, {"includedPermissions": ["iam.serviceAccounts.actAs"]}),
            PROJECT_POLICY: policy(bound("roles/aiplatform.user")),
            "POST /iam/.*:getIamPolicy": policy(bound("roles/iam.user")),
        },
    ),
    Situation(
        "service account: the default one",
        "ok bucket rights: 12-compute@developer.gserviceaccount.com may use gs://artifacts",
        changes={"SERVICE_ACCOUNT": ""},
    ),
    # the bucket
    Situation(
        "bucket: absent",
        "FAILED bucket: gs://artifacts does not exist; run: gcloud storage buckets create"
        " gs://artifacts --project=p --location=europe-west4",
        {"GET /storage/v1/b/artifacts\\?": refusal(404, "", "no such bucket")},
    ),
    Situation(
        "bucket: elsewhere",
        "FAILED bucket: gs://artifacts lies in us-central1, the run in europe-west4; run: gcloud"
        " storage buckets create gs://artifacts-europe-west4",
        {"GET /storage/v1/b/artifacts\\?": (200, {"location": "US-CENTRAL1"})},
    ),
    Situation(
        "bucket: an empty answer",
        "? bucket: could not be checked: the service answered nonsense (a bucket without a loc",
        {"GET /storage/v1/b/artifacts\\?": (200, {})},
    ),
    Situation(
        "bucket: garbage",
        "? bucket: could not be checked: the service answered nonsense (Expecting value",
        {"GET /storage/v1/b/artifacts\\?": (200, "<html>a login page</html>")},
    ),
    Situation(
        "bucket: an answer of another shape",
        "? bucket: could not be checked: the service answered nonsense (AttributeError: 'list'",
        {"GET /storage/v1/b/artifacts\\?": (200, [])},
    ),
    Situation(
        "bucket: not to be looked at",
        "? bucket: could not be checked: your account may not look",
        {"GET /storage/v1/b/artifacts\\?": refusal(403, "", "storage.buckets.get")},
    ),
    Situation(
        "bucket rights: read only",
        f"FAILED bucket rights: {STAGES} may not use gs://artifacts (it lacks storage.objects."
        "create, storage.objects.delete); run: gcloud storage buckets add-iam-policy-binding"
        f" gs://artifacts --member=serviceAccount:{STAGES} --role=roles/storage.objectUser",
        {
            "iam/testPermissions": (
                200,
                {"permissions": ["storage.objects.get", "storage.objects.list"]},
            )
        },
    ),
    Situation(
        "bucket rights: by policies",
        f"ok bucket rights: the policies let {STAGES} use gs://artifacts",
        {
            **NO_TOKEN,
            **ROLES,
            BUCKET_POLICY: policy(bound("roles/storage.objectViewer")),
            PROJECT_POLICY: policy(bound("roles/storage.writer")),
        },
    ),
    Situation(
        "bucket rights: by a basic role",
        f"ok bucket rights: the policies let {STAGES} use gs://artifacts",
        {
            **NO_TOKEN,
            **ROLES,
            BUCKET_POLICY: policy(
                bound("roles/storage.legacyBucketOwner", "projectEditor:p"),
                bound("roles/storage.objectViewer", "projectEditor:p"),
            ),
            PROJECT_POLICY: policy(bound("roles/editor")),
        },
    ),
    Situation(
        "bucket rights: of a bucket of another project",
        f"FAILED checkpoint: gs://base/ckpt.pt is there (3 MiB); no policy gives {STAGES} storage",
        {
            **NO_TOKEN,
            **ROLES,
            "GET /storage/v1/b/base\\?": (200, {"projectNumber": "99"}),
            "projects/p:getIamPolicy": policy(bound("roles/storage.objectViewer")),
        },
        {"PARAMS": "resume_gcs_uri=gs://base/ckpt.pt"},
    ),
    Situation(
        "bucket rights: no policy",
        f"FAILED bucket rights: no policy gives {STAGES} storage.objects.create,",
        NO_TOKEN,
    ),
    Situation(
        "bucket rights: perhaps by a group",
        "but not seen: the members of group:all@x; run: gcloud storage buckets",
        {
            **NO_TOKEN,
            **ROLES,
            BUCKET_POLICY: policy(bound("roles/storage.objectViewer", "group:all@x")),
        },
    ),
    Situation(
        "bucket rights: perhaps on a condition",
        "but not seen: a condition of a binding; run:",
        {
            **NO_TOKEN,
            **ROLES,
            BUCKET_POLICY: policy(
                bound("roles/storage.objectViewer", condition={"expression": "request.time"})
            ),
        },
    ),
    Situation(
        "bucket rights: perhaps by a folder",
        "but not seen: the policies of the folders above the project; run:",
        {**NO_TOKEN, "getAncestry": (200, {"ancestor": [{}, {}]})},
    ),
    Situation(
        "bucket rights: policies that are hidden",
        "but not seen: the policy of project 12 (denied), the policy of gs://artifacts (denied)",
        {**NO_TOKEN, PROJECT_POLICY: DENIED, BUCKET_POLICY: DENIED},
    ),
    # the image
    Situation(
        "image: absent",
        f"FAILED image: {IMAGE} does not exist; run: gcloud artifacts docker images list"
        " europe-docker.pkg.dev/p/r --include-tags",
        {"GET /artifactregistry/.*/dockerImages/": refusal(404, "NOT_FOUND", "absent")},
    ),
    Situation(
        "image: by tag",
        "ok image: trainer is there, under a tag, which may come to name another one",
        changes={"TRAINER_IMAGE": "europe-docker.pkg.dev/p/r/trainer:1"},
    ),
    Situation(
        "image: of another registry",
        "? image: could not be checked: ghcr.io/x/trainer:1 is not in Artifact Registry",
        changes={"TRAINER_IMAGE": "ghcr.io/x/trainer:1"},
    ),
    Situation(
        "image rights: not to be pulled",
        f"FAILED image rights: {STAGES} may not use repository r (it lacks artifactregistry."
        "repositories.downloadArtifacts); run: gcloud artifacts repositories add-iam-policy-binding"
        f" r --location=europe --project=p --member=serviceAccount:{STAGES}",
        {"artifactregistry/.*:testIamPermissions": (200, {})},
    ),
    # machines
    Situation(
        "region: without the machine",
        "FAILED anneal on a2-highgpu-1g (NVIDIA_TESLA_A100): europe-west4 does not offer it; it is"
        " in us-west1; run: gcloud compute machine-types list",
        {
            "compute/": (
                200,
                {"items": {"zones/us-west1-b": {"machineTypes": [{}]}, "zones/europe-west4-a": {}}},
            )
        },
    ),
    Situation(
        "region: attached accelerators",
        "FAILED anneal on n1-standard-8 (NVIDIA_TESLA_T4): europe-west4 does not offer it; no",
        {"compute/.*/acceleratorTypes": (200, {"items": {}})},
        {"ANNEAL_MACHINES": "n1-standard-8:NVIDIA_TESLA_T4:1"},
    ),
    Situation(
        "region: an empty answer",
        "? anneal on a2-highgpu-1g (NVIDIA_TESLA_A100): could not be checked: quota 8, 1 asked for"
        " (custom_model_training_nvidia_a100_gpus); the service answered nonsense (machineTypes",
        {"compute/": (200, {})},
    ),
    Situation(
        "region: a zone that does not answer",
        "could not be checked: quota 8, 1 asked for (custom_model_training_nvidia_a100_gpus); the"
        " service is down (europe-west4-b does not answer)",
        {
            "compute/": (
                200,
                {"items": {"zones/x-a": {}}, "unreachables": ["projects/p/zones/europe-west4-b"]},
            )
        },
    ),
    Situation(
        "region: Compute Engine disabled",
        "? anneal on a2-highgpu-1g (NVIDIA_TESLA_A100): could not be checked: quota 8, 1 asked for"
        " (custom_model_training_nvidia_a100_gpus); compute.googleapis.com is not enabled",
        {"compute/": disabled("compute")},
    ),
    Situation(
        "quota: too small",
        "FAILED anneal on a2-highgpu-8g (8 x NVIDIA_TESLA_A100): quota 4 in europe-west4, 8 asked"
        " for (custom_model_training_preemptible_nvidia_a100_gpus); run: gcloud beta quotas"
        " preferences create --project=p",
        {"preemptible_nvidia_a100_gpus": quota({"europe-west4": 4})},
        {"ANNEAL_MACHINES": "a2-highgpu-8g:NVIDIA_TESLA_A100:8", "ANNEAL_SCHEDULING": "spot"},
    ),
    Situation(
        "quota: none in this region",
        "FAILED anneal on a3-highgpu-1g (NVIDIA_H100_80GB): quota 0 in europe-west4, 1 asked for",
        {"training_nvidia_h100_gpus": quota({"": 0, "us-central1": 8})},
        {"ANNEAL_MACHINES": "a3-highgpu-1g:NVIDIA_H100_80GB:1"},
    ),
    Situation(
        "quota: of all workers of the teacher",
        "FAILED targets on a2-highgpu-1g (NVIDIA_TESLA_A100): quota 8 in europe-west4, 9 asked for",
        changes={"PARAMS": "teacher=cached target_workers=9"},
    ),
    Situation(
        "quota: without limit",
        "ok anneal on a2-highgpu-1g (NVIDIA_TESLA_A100): quota without limit, 1 asked for",
        {"consumerQuotaMetrics": quota({"": -1})},
    ),
    Situation(
        "quota: unknown",
        "? anneal on a2-highgpu-1g (NVIDIA_TESLA_A100): could not be checked: the service answered"
        " nonsense (a quota without a limit for each region)",
        {"consumerQuotaMetrics": (200, {"consumerQuotaLimits": []})},
    ),
    Situation(
        "machines: the second is chosen",
        "ok anneal on a2-ultragpu-1g (NVIDIA_A100_80GB): quota 8, 1 asked for"
        " (custom_model_training_nvidia_a100_80gb_gpus) (taken, for a3-highgpu-1g: quota 0 in",
        {"training_nvidia_h100_gpus": quota({"": 0})},
        {
            "ANNEAL_MACHINES": "a3-highgpu-1g:NVIDIA_H100_80GB:1,"
            " a2-ultragpu-1g:NVIDIA_A100_80GB:1, g2-standard-8:NVIDIA_L4:1"
        },
    ),
    Situation(
        "machines: none can be had",
        "1 asked for (custom_model_training_nvidia_h100_gpus) (nor g2-standard-8: quota 0 in",
        {"consumerQuotaMetrics": quota({"": 0})},
        {"ANNEAL_MACHINES": "a3-highgpu-1g:NVIDIA_H100_80GB:1, g2-standard-8:NVIDIA_L4:1"},
    ),
    # inputs
    Situation(
        "checkpoint: there",
        f"ok checkpoint: gs://base/ckpt.pt is there (3 MiB); {STAGES} may use gs://base",
        changes={"PARAMS": "resume_gcs_uri=gs://base/ckpt.pt"},
    ),
    Situation(
        "checkpoint: absent",
        "FAILED checkpoint: gs://base/ckpt.pt does not exist; run: gcloud storage ls gs://base/",
        {"b/base/o/ckpt.pt": refusal(404, "", "No such object")},
        {"PARAMS": "resume_gcs_uri=gs://base/ckpt.pt"},
    ),
    Situation(
        "checkpoint: closed to the stages",
        f"FAILED checkpoint: {STAGES} may not use gs://base (it lacks storage.objects.get, storage."
        "objects.list); run: gcloud storage buckets add-iam-policy-binding gs://base",
        {"b/base/o/ckpt.pt": refusal(403, "", "denied"), "b/base/iam/testP": (200, {})},
        {"PARAMS": "resume_gcs_uri=gs://base/ckpt.pt"},
    ),
    Situation(
        "teacher: in a bucket",
        f"ok teacher: {STAGES} may use gs://base",
        {"b/base/o\\?.*prefix=teachers%2Fone%2F": (200, {"items": [{"name": "x"}]})},
        {"PARAMS": "teacher_name=gs://base/teachers/one/"},
    ),
    Situation(
        "teacher: not in its bucket",
        "FAILED teacher: nothing is at gs://base/teachers/one; run: gcloud storage ls gs://base/",
        {"b/base/o/teach": refusal(404, "", "No such object"), "b/base/o\\?": (200, {})},
        {"PARAMS": "teacher_name=gs://base/teachers/one"},
    ),
    Situation(
        "data set: closed to the stages",
        f"FAILED data set: {STAGES} may not use gs://base (it lacks storage.objects.get, storage."
        "objects.list); run: gcloud storage buckets add-iam-policy-binding gs://base",
        {"b/base/o\\?": refusal(403, "", "denied"), "b/base/iam/testP": (200, {})},
        {"PARAMS": "dataset_name=gs://base/texts dataset_config="},
    ),
    Situation(
        "secret: absent",
        "FAILED secret: projects/p/secrets/hf has no version latest; run: gcloud secrets create hf",
        {"secretmanager/": refusal(404, "NOT_FOUND", "absent")},
        {"PARAMS": "hf_secret_name=projects/p/secrets/hf"},
    ),
    Situation(
        "secret: closed to the stages",
        f"FAILED secret: {STAGES} may not use secret hf (it lacks secretmanager.versions.access);"
        " run: gcloud secrets add-iam-policy-binding hf --project=p",
        {"secretmanager/.*testIamPermissions": (200, {})},
        {"PARAMS": "hf_secret_name=projects/p/secrets/hf"},
    ),
    Situation(
        "secret: disabled",
        "FAILED secret: version 3 of projects/p/secrets/hf/versions/3 is disabled; run: gcloud",
        {"secretmanager/": (200, {"state": "DISABLED"})},
        {"PARAMS": "hf_secret_name=projects/p/secrets/hf/versions/3"},
    ),
    # credentials
    Situation(
        "credentials: revoked",
        "FAILED credentials: invalid_grant: revoked; run: gcloud auth application-default login",
        {"POST /token": (400, {"error": "invalid_grant", "error_description": "revoked"})},
    ),
    Situation(
        "credentials: unreachable",
        "? credentials: could not be checked: no answer in time, of which",
        {"POST /token": "hangs"},
        {"PREFLIGHT_SECONDS": "1"},
    ),
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda s: s.name)
def test_each_situation_has_its_line(
    services: GoogleServices,
    environment: dict[str, str],
    situation: Situation,
    capsys: pytest.CaptureFixture[str],
) -> None:
    services.rules = situation.rules
    done = run("preflight", environment | situation.changes)
    lines = done.stdout.splitlines()
    line = next((line for line in lines if situation.line in line), "")
    assert line, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    failed = any(line.startswith("FAILED ") for line in lines)
    assert done.returncode == (1 if failed else 0)
    # Whatever is amiss with one, what has nothing to do with it is as ever
    here = ("credentials", " data set: ")
    assert any(what in line for what in here) or "ok data set: wikitext is there" in lines
    with capsys.disabled():
        print(f"\n  {situation.name:<42} {line[:160]}", end="")


HUB: list[Situation] = [
    Situation("hub: there", "ok teacher: gpt2-xl is there"),
    Situation(
        "hub: absent",
        "FAILED teacher: there is no model 'gpt2-xl' on the hub that everyone may read; run: give",
        {"api/models/": (404, {"error": "Repository not found"})},
    ),
    Situation(
        "hub: without the revision",
        "FAILED teacher: gpt2-xl has no revision 'v2'; run: give another teacher_revision in PARA",
        {"api/models/gpt2-xl/revision/v2": (404, {"error": "Revision not found"})},
        {"PARAMS": "teacher_revision=v2"},
    ),
    Situation(
        "hub: absent, or private to the token of the stages",
        "? teacher: could not be checked: gpt2-xl is private or absent; the token of hf_secret_n",
        {"api/models/": (404, {"error": "Repository not found"})},
        {"PARAMS": "hf_secret_name=projects/p/secrets/hf"},
    ),
    Situation(
        "hub: gated",
        "FAILED teacher: gpt2-xl is open to your token, but the stages have none; run: gcloud",
        {"api/models/[^/]*$": (200, {"id": "x", "gated": "manual", "private": False})},
    ),
    Situation(
        "hub: down",
        "? data set: could not be checked: the hub did not say (Server error '502 Bad Gateway'",
        {"api/datasets/": (502, "<html>bad gateway</html>")},
    ),
    Situation(
        "hub: not on it",
        "? teacher: could not be checked: /gcs/b/teacher is not on the Hugging Face hub",
        changes={"PARAMS": "teacher_name=/gcs/b/teacher"},
    ),
]


@pytest.mark.parametrize("situation", HUB, ids=lambda s: s.name)
def test_teacher_and_data_set(
    hub: GoogleServices, environment: dict[str, str], situation: Situation
) -> None:
    hub.rules = situation.rules
    codes = {"absent": "RepoNotFound", "revision": "RevisionNotFound"}
    code = next((code for what, code in codes.items() if what in situation.name), "")
    hub.headers = {"X-Error-Code": code} if code else {}
    done = run("preflight", environment | situation.changes)
    assert any(situation.line in line for line in done.stdout.splitlines()), done.stdout


def test_what_hangs_keeps_nobody(services: GoogleServices, environment: dict[str, str]) -> None:
    services.rules = {"compute/|batchGet|/storage/": "hangs"}
    done = run("preflight", environment | {"PREFLIGHT_SECONDS": "2"})
    assert done.returncode == 0, done.stdout
    late = "could not be checked: no answer in time"
    assert [line.split(":")[0] for line in done.stdout.splitlines() if late in line] == [
        "? services",
        "? bucket",
        "? bucket rights",
        "? anneal on a2-highgpu-1g (NVIDIA_TESLA_A100)",
        "? continue on a2-highgpu-1g (NVIDIA_TESLA_A100)",
        "? evaluate on a2-highgpu-1g (NVIDIA_TESLA_A100)",
    ]
    assert "9 of 15 checks are fine, 6 could not be made" in done.stdout


def test_only_reading_requests_are_sent(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    params = "resume_gcs_uri=gs://base/x.pt hf_secret_name=projects/p/secrets/hf"
    assert run("preflight", environment | {"PARAMS": params}).returncode == 0
    posts = {path.rpartition(":")[2] for method, path, _ in services.requests if method == "POST"}
    assert posts == {"testIamPermissions", "generateAccessToken"}
    assert {method for method, _, _ in services.requests} == {"GET", "POST"}


def test_a_table_on_a_terminal(services: GoogleServices, environment: dict[str, str]) -> None:
    services.rules = {"iam/testPermissions": (200, {})}
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pipelines.preflight"]
    given = around(environment | {"COLUMNS": "200"})
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=given, timeout=120)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the end of what a terminal shows
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    assert done.returncode == 1
    rows = shown.decode().splitlines()
    at = rows[0].index("robot@p")
    assert rows[0].startswith("ok      credentials ")
    assert all(row[at - 2 : at] == "  " and row[at] != " " for row in rows)
    assert any(row.split("$ ")[-1].startswith("gcloud storage buckets add-iam") for row in rows)


def test_nothing_is_sent_where_a_right_is_missing(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    services.rules = {"iam/testPermissions": (200, {"permissions": ["storage.objects.get"]})}
    done = run("submit", environment, "vertex")
    assert done.returncode == 1
    assert f"FAILED bucket rights: {STAGES} may not use gs://artifacts" in done.stdout
    assert "ok " not in done.stdout
    assert last_message(done).startswith("nothing was sent: 14 of 15 checks are fine, 1 failed; PR")
    assert services.jobs == {}
    done = run("submit", environment | {"PREFLIGHT": "0"}, "vertex")
    assert done.returncode == 0, done.stderr
    assert len(services.jobs) == 1


def test_what_cannot_be_checked_does_not_keep_a_run_from_being_sent(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    services.rules = {"compute/": DENIED}
    done = run("submit", environment, "vertex")
    assert done.returncode == 0, done.stderr
    assert "could not be checked: quota 8, 1 asked for" in done.stdout
    assert len(services.jobs) == 1


def test_a_run_is_sent_on_the_machine_that_the_quota_has_room_for(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    services.rules = {"training_nvidia_h100_gpus": quota({"": 0})}
    listed = "a3-highgpu-1g:NVIDIA_H100_80GB:1, a2-ultragpu-2g:NVIDIA_A100_80GB:2"
    done = run("submit", environment | {"ANNEAL_MACHINES": listed}, "vertex")
    assert done.returncode == 0, done.stderr
    assert "anneal on a2-ultragpu-2g (2 x NVIDIA_A100_80GB): quota 8, 2 asked for" in done.stdout
    assert "(taken, for a3-highgpu-1g: quota 0 in europe-west4, 1 asked for" in done.stdout
    chosen, estimated = (done.stdout.index(said) for said in ("(taken, for", "estimate of liquid"))
    assert chosen < estimated < done.stdout.index("a2-ultragpu-2g, 2 A100")
    assert "a3-highgpu-1g, 1 H100" not in done.stdout
    (job,) = services.jobs.values()
    machines = {
        title: pools[0]["machine_spec"]["machine_type"]
        for title, pools in pools_of(job["pipelineSpec"]).items()
    }
    assert machines["anneal"] == "a2-ultragpu-2g"
    assert machines["continue"] == "a2-highgpu-1g"


def test_a_search_needs_the_quota_of_all_trials_that_run_at_a_time(
    services: GoogleServices, environment: dict[str, str], tmp_path: Path
) -> None:
    services.rules = {"training_nvidia_a100_gpus": quota({"europe-west4": 3})}
    grid = tmp_path / "grid.yaml"
    for parallelism, status in ((4, 1), (3, 0)):
        grid.write_text(f"{{settings: {{alpha: [0.3, 0.5, 0.7]}}, parallelism: {parallelism}}}")
        given = {"GRID": str(grid), "PARAMS": "target_workers=1"}
        done = run("search", environment | given, "vertex")
        assert done.returncode == status, done.stdout + done.stderr
        asked = "quota 3 in europe-west4, 4 asked for (custom_model_training_nvidia_a100_gpus)"
        assert (asked in done.stdout) == (status == 1)
    assert len(services.jobs) == 1


def test_a_repetition_is_looked_at_as_the_run_that_it_is(
    services: GoogleServices, environment: dict[str, str]
) -> None:
    """Its own bucket, account and image count, and the machines of what runs again alone."""
    run_id = finished_run(services, environment | {"PREFLIGHT": "0"})
    services.requests.clear()
    services.rules = {
        "training_nvidia_a100_gpus": quota({"": 0}),
        "api/datasets/": (404, {}),
    }
    given = {"RUN": run_id, "STAGE": "evaluate", "SERVICE_ACCOUNT": "", "PIPELINE_ROOT": ""}
    given |= {"TRAINER_IMAGE": ""}
    done = run("rerun", environment | given)
    assert done.returncode == 1
    assert [line for line in done.stdout.splitlines() if line.startswith("FAILED")] == [
        line for line in done.stdout.splitlines() if "evaluate on a2-highgpu-1g" in line
    ]
    assert any("/b/artifacts/iam/testPermissions" in path for _, path, _ in services.requests)
    assert any(STAGES in path for _, path, _ in services.requests)
    assert len(services.jobs) == 1
    listed = "a2-highgpu-1g:NVIDIA_TESLA_A100:1, g2-standard-8:NVIDIA_L4:1"
    done = run("rerun", environment | given | {"EVALUATE_MACHINES": listed})
    assert done.returncode == 0, done.stderr
    assert "evaluate on g2-standard-8 (NVIDIA_L4): quota 8, 1 asked for" in done.stdout
    assert "evaluate runs on g2-standard-8 (1 x NVIDIA_L4, standard)" in done.stdout
    assert "\nevaluate  g2-standard-8, 1 L4 " in done.stdout
    assert len(services.jobs) == 2
