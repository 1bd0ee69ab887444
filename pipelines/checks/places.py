"""Whether project, bucket, image and secret are there, and open to whom they must be."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from urllib.parse import quote

from google.api_core import exceptions as api
from google.cloud import storage

from pipelines import vertex
from pipelines.checks.findings import Check, Finding, GarbageError, disabled, unchecked
from pipelines.checks.google_cloud import TIMEOUT, Account
from pipelines.checks.rights import Bindings, Resource, StageAccount, bindings_of
from pipelines.settings import Settings
from trainer.storage.places import is_remote

_CREATE = frozenset({"aiplatform.pipelineJobs.create", "aiplatform.pipelineJobs.get"})
_START = frozenset({"aiplatform.customJobs.create", "aiplatform.customJobs.get"})
_ACT = frozenset({"iam.serviceAccounts.actAs"})
_PULL = frozenset({"artifactregistry.repositories.downloadArtifacts"})
_ACCESS = frozenset({"secretmanager.versions.access"})
_READ = frozenset({"storage.objects.get", "storage.objects.list"})
_WRITE = frozenset({"storage.objects.create", "storage.objects.delete"})
_IMAGE = re.compile(
    r"(?P<location>[a-z0-9-]+)-docker\.pkg\.dev/(?P<project>[^/]+)/(?P<repository>[^/]+)"
    r"/(?P<name>[^@:]+)(?:@(?P<digest>sha256:[0-9a-f]{64})|:(?P<tag>[\w.-]+))?"
)
_SECRET = re.compile(r"projects/([^/]+)/secrets/([^/]+)(?:/versions/([^/]+))?")


@dataclass(frozen=True)
class Places:
    """The checks of where a run of these settings and parameters would go."""

    settings: Settings
    parameters: Mapping[str, Any]
    caller: Account
    stages: StageAccount

    def checks(self) -> dict[str, Check]:
        """By name, in the order of the report."""
        checks: dict[str, Check] = {
            "project": self.project,
            "services": self.services,
            "runs": self.runs,
            "service account": self.service_account,
            "job rights": self.job_rights,
            "bucket": self.bucket,
            "bucket rights": self.bucket_rights,
            "image": self.image,
        }
        if _IMAGE.fullmatch(self.settings.trainer_image):
            checks["image rights"] = self.image_rights
        if self.parameters.get("resume_gcs_uri"):
            checks["checkpoint"] = self.checkpoint
        for check, parameter in (("teacher", "teacher_name"), ("data set", "dataset_name")):
            uri = str(self.parameters[parameter])
            if is_remote(uri):
                checks[check] = partial(self.directory, check, parameter, uri)
        if self.parameters.get("hf_secret_name"):
            checks["secret"] = self.secret
        return checks

    def project(self) -> Finding:
        """The project is there, and not about to be deleted."""
        name = self.settings.project
        try:
            answer = self.caller.ask("cloudresourcemanager", f"v1/projects/{name}")
        except (api.Forbidden, api.NotFound) as error:
            if disabled(error):
                raise
            return Finding(
                "project",
                "failed",
                f"there is no project {name!r} that your account may see",
                "gcloud projects list  # then give PROJECT=",
            )
        state = answer.get("lifecycleState", "ACTIVE")
        if state != "ACTIVE":
            mend = f"gcloud projects undelete {name}"
            return Finding("project", "failed", f"{name} is {state.lower()}", mend)
        return Finding("project", "fine", name)

    def services(self) -> Finding:
        """The services that a run needs are enabled."""
        names = ["aiplatform", "storage"]
        if _IMAGE.fullmatch(self.settings.trainer_image):
            names.append("artifactregistry")
        if self.parameters.get("hf_secret_name"):
            names.append("secretmanager")
        project = self.settings.project
        asked = "&".join(f"names=projects/{project}/services/{n}.googleapis.com" for n in names)
        answer = self.caller.ask("serviceusage", f"v1/projects/{project}/services:batchGet?{asked}")
        if not answer.get("services"):
            raise GarbageError("no service, of those that were asked for")
        enabled = {
            str(entry.get("name", "")).rpartition("/")[2]
            for entry in answer.get("services", ())
            if entry.get("state") == "ENABLED"
        }
        missing = [f"{n}.googleapis.com" for n in names if f"{n}.googleapis.com" not in enabled]
        if missing:
            mend = f"gcloud services enable {' '.join(missing)} --project={project}"
            said = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not enabled"
            return Finding("services", "failed", said, mend)
        return Finding("services", "fine", f"{', '.join(names)} are enabled")

    def runs(self) -> Finding:
        """Vertex AI answers in the region, and the caller may create runs there."""
        settings = self.settings
        grant = (
            f"gcloud projects add-iam-policy-binding {settings.project} --condition=None"
            f" --member={self.caller.member} --role=roles/aiplatform.user"
        )
        path = "cloudresourcemanager", f"v1/projects/{settings.project}"
        missing = sorted(_CREATE.difference(_held(*path, _CREATE, self.caller)))
        if missing:
            return Finding("runs", "failed", f"your account lacks {', '.join(missing)}", grant)
        request = {"parent": settings.place, "page_size": 1}
        client = vertex.client(settings, "v1")
        try:
            client.list_pipeline_jobs(request=request, timeout=sum(TIMEOUT), retry=None)
        except api.Forbidden as error:
            if disabled(error):
                return replace(unchecked("runs", error, settings.project), verdict="failed")
            said = f"your account may not list runs ({vertex.first_line(error)})"
            return Finding("runs", "failed", said, grant)
        return Finding("runs", "fine", f"your account may create them in {settings.region}")

    def service_account(self) -> Finding:
        """The account of the stages is there, and the caller may let runs use it."""
        email, name = self.stages.email, "service account"
        project = _project_of(email, self.settings.project)
        path = f"v1/projects/-/serviceAccounts/{email}"
        try:
            found = self.caller.ask("iam", path)
        except api.NotFound:
            short = email.partition("@")[0]
            create = f"gcloud iam service-accounts create {short} --project={project}"
            return Finding(name, "failed", f"{email} does not exist", create)
        if found.get("disabled"):
            enable = f"gcloud iam service-accounts enable {email} --project={project}"
            return Finding(name, "failed", f"{email} is disabled", enable)
        if not _ACT.issubset(_held("iam", path, _ACT, self.caller)):
            grant = (
                f"gcloud iam service-accounts add-iam-policy-binding {email} --project={project}"
                f" --member={self.caller.member} --role=roles/iam.serviceAccountUser"
            )
            return Finding(name, "failed", f"your account may not let runs use {email}", grant)
        return Finding(name, "fine", f"your account may let runs use {email}")

    def job_rights(self) -> Finding:
        """The account of the run may start the custom jobs of its stages, as itself."""
        email, project = self.stages.email, self.settings.project
        jobs = Resource(
            title=f"custom jobs of project {project}",
            project=project,
            needed=_START,
            held=partial(_held, "cloudresourcemanager", f"v1/projects/{project}", _START),
            policy=lambda _: [],  # the project's own, which is always read
            grant=f"gcloud projects add-iam-policy-binding {project} --condition=None",
            role="roles/aiplatform.user",
        )
        path = f"v1/projects/-/serviceAccounts/{email}"
        itself = Resource(
            title="itself for them",
            project=project,
            needed=_ACT,
            held=partial(_held, "iam", path, _ACT),
            policy=partial(_policy, "iam", path),
            grant=f"gcloud iam service-accounts add-iam-policy-binding {email}"
            f" --project={_project_of(email, project)}",
            role="roles/iam.serviceAccountUser",
        )
        found = [self.stages.finding("job rights", one) for one in (jobs, itself)]
        order = ("failed", "unchecked", "fine")
        return min(found, key=lambda one: order.index(one.verdict))

    def bucket(self) -> Finding:
        """The bucket of the artifacts is there, in the region of the run."""
        name, region = _bucket_name(self.settings.pipeline_root), self.settings.region
        create = f"gcloud storage buckets create gs://{name} --project={self.settings.project}"
        create += f" --location={region} --uniform-bucket-level-access"
        bucket = self.caller.bucket(name, self.settings.project)
        try:
            bucket.reload(timeout=TIMEOUT, retry=None)
        except api.NotFound:
            return Finding("bucket", "failed", f"gs://{name} does not exist", create)
        if not bucket.location:
            raise GarbageError("a bucket without a location")
        location = str(bucket.location).lower()
        parts = [str(part).lower() for part in bucket.data_locations or ()]
        if region in (location, *parts):
            return Finding("bucket", "fine", f"gs://{name} lies in {location}")
        said = f"gs://{name} lies in {location}, the run in {region}"
        if location in ("us", "eu", "asia") and region.startswith(location):
            return Finding("bucket", "unchecked", f"{said}; Vertex AI may refuse several regions")
        create = create.replace(f"gs://{name}", f"gs://{name}-{region}")
        return Finding("bucket", "failed", said, f"{create}  # then give PIPELINE_ROOT=")

    def bucket_rights(self) -> Finding:
        """The stages may read and write the bucket."""
        name = _bucket_name(self.settings.pipeline_root)
        return self.stages.finding("bucket rights", self._bucket(name, _READ | _WRITE))

    def checkpoint(self) -> Finding:
        """The checkpoint is there, and the stages may read it."""
        uri = str(self.parameters["resume_gcs_uri"])
        name, _, path = uri.removeprefix("gs://").partition("/")
        reader = self.stages.itself or self.caller
        blob = reader.bucket(name, self.settings.project).blob(path)
        try:
            blob.reload(timeout=TIMEOUT, retry=None)
        except api.NotFound:
            mend = f"gcloud storage ls {uri.rpartition('/')[0]}/  # then give resume_gcs_uri="
            return Finding("checkpoint", "failed", f"{uri} does not exist", mend)
        except api.Forbidden:
            if reader is self.caller:
                raise
        size = f"{uri} is there ({blob.size / 2**20:,.0f} MiB); " if blob.size else ""
        return self.stages.finding("checkpoint", self._bucket(name, _READ), size)

    def directory(self, check: str, parameter: str, uri: str) -> Finding:
        """A teacher or data set is in its bucket, and the stages may read it."""
        name, _, path = uri.removeprefix("gs://").rstrip("/").partition("/")
        reader = self.stages.itself or self.caller
        bucket = reader.bucket(name, self.settings.project)
        asking: dict[str, Any] = {"timeout": TIMEOUT, "retry": None}
        there = False
        try:
            below = bucket.list_blobs(prefix=path and f"{path}/", max_results=1, **asking)
            there = any(True for _ in below) or (bool(path) and bucket.blob(path).exists(**asking))
        except api.NotFound:
            pass
        except api.Forbidden:
            if reader is self.caller:
                raise
            there = True  # perhaps; which right it lacks is said below
        if not there:
            mend = f"gcloud storage ls gs://{name}/  # then give {parameter}="
            return Finding(check, "failed", f"nothing is at {uri}", mend)
        return self.stages.finding(check, self._bucket(name, _READ))

    def image(self) -> Finding:
        """The image is in its repository."""
        image = self.settings.trainer_image
        parts = _IMAGE.fullmatch(image)
        if not parts:
            said = f"{image} is not in Artifact Registry"
            return Finding("image", "unchecked", said)
        repository, name = _repository(parts), quote(parts["name"], safe="")
        if parts["digest"]:
            path = f"{repository}/dockerImages/{name}@{parts['digest']}"
        else:
            path = f"{repository}/packages/{name}/tags/{parts['tag'] or 'latest'}"
        try:
            self.caller.ask("artifactregistry", f"v1/{path}")
        except api.NotFound:
            place = image.partition("@")[0].rpartition("/")[0]
            mend = f"gcloud artifacts docker images list {place} --include-tags"
            said = f"{image} does not exist"
            return Finding("image", "failed", said, f"{mend}  # or make build-image")
        kept = "" if parts["digest"] else ", under a tag, which may come to name another one"
        return Finding("image", "fine", f"{parts['name']} is there{kept}")

    def image_rights(self) -> Finding:
        """The stages may pull the image."""
        parts = _IMAGE.fullmatch(self.settings.trainer_image)
        assert parts
        repository = _repository(parts)
        resource = Resource(
            title=f"repository {parts['repository']}",
            project=parts["project"],
            needed=_PULL,
            held=partial(_held, "artifactregistry", f"v1/{repository}", _PULL),
            policy=partial(_policy, "artifactregistry", f"v1/{repository}"),
            grant=f"gcloud artifacts repositories add-iam-policy-binding {parts['repository']}"
            f" --location={parts['location']} --project={parts['project']}",
            role="roles/artifactregistry.reader",
        )
        return self.stages.finding("image rights", resource)

    def secret(self) -> Finding:
        """The secret has a version that is enabled, and the stages may read it."""
        full = str(self.parameters["hf_secret_name"])
        parts = _SECRET.fullmatch(full)
        assert parts, "parameters are checked before"
        project, secret, version = parts[1], parts[2], parts[3] or "latest"
        path = f"v1/projects/{project}/secrets/{secret}"
        add = f"gcloud secrets versions add {secret} --project={project} --data-file=-"
        try:
            found = self.caller.ask("secretmanager", f"{path}/versions/{version}")
        except api.NotFound:
            mend = f"gcloud secrets create {secret} --project={project} --data-file=-"
            return Finding("secret", "failed", f"{full} has no version {version}", mend)
        except api.Forbidden as error:
            if disabled(error) or not self.stages.itself:
                raise
            found = {}
        if found.get("state", "ENABLED") != "ENABLED":
            said = f"version {version} of {full} is {str(found['state']).lower()}"
            return Finding("secret", "failed", said, add)
        resource = Resource(
            title=f"secret {secret}",
            project=project,
            needed=_ACCESS,
            held=partial(_held, "secretmanager", path, _ACCESS),
            policy=partial(_policy, "secretmanager", path),
            grant=f"gcloud secrets add-iam-policy-binding {secret} --project={project}",
            role="roles/secretmanager.secretAccessor",
        )
        return self.stages.finding("secret", resource)

    def _bucket(self, name: str, needed: frozenset[str]) -> Resource:
        project = self.settings.project
        owner = project
        if not self.stages.itself:
            found = self.caller.bucket(name, project)
            found.reload(timeout=TIMEOUT, retry=None)
            owner = str(found.project_number or project)

        def held(account: Account) -> list[str]:
            bucket: storage.Bucket = account.bucket(name, project)
            wanted = sorted(needed)
            return list(bucket.test_iam_permissions(wanted, timeout=TIMEOUT, retry=None))

        def policy(account: Account) -> Bindings:
            bucket: storage.Bucket = account.bucket(name, project)
            found = bucket.get_iam_policy(requested_policy_version=3, timeout=TIMEOUT, retry=None)
            return [dict(binding) for binding in found.bindings]

        writes = needed & _WRITE
        return Resource(
            title=f"gs://{name}",
            project=owner,
            needed=needed,
            held=held,
            policy=policy,
            grant=f"gcloud storage buckets add-iam-policy-binding gs://{name}",
            role=f"roles/storage.{'objectUser' if writes else 'objectViewer'}",
        )


def _project_of(email: str, otherwise: str) -> str:
    """The project that a service account's address names; default accounts name none."""
    found = re.fullmatch(r"[^@]+@([^.]+)\.iam\.gserviceaccount\.com", email)
    return found[1] if found else otherwise


def _bucket_name(uri: str) -> str:
    return uri.removeprefix("gs://").partition("/")[0]


def _repository(image: re.Match[str]) -> str:
    return (
        f"projects/{image['project']}/locations/{image['location']}"
        f"/repositories/{image['repository']}"
    )


def _held(service: str, path: str, needed: frozenset[str], account: Account) -> list[str]:
    answer = account.ask(service, f"{path}:testIamPermissions", {"permissions": sorted(needed)})
    return list(answer.get("permissions", ()))


def _policy(service: str, path: str, account: Account) -> Bindings:
    # Of these services, IAM alone is asked by a POST
    body: dict[str, Any] | None = {} if service == "iam" else None
    asked = f"{path}:getIamPolicy?options.requestedPolicyVersion=3"
    return bindings_of(account.ask(service, asked, body))
