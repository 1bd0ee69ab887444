"""The stage that registers a model: the real client against a loopback server."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud.aiplatform.initializer import global_config
from kfp import dsl

from components.register_model import register_model
from tests.pipelines.loopback import Loopback
from trainer.runtime.errors import LiquidError

NAME = "projects/p/locations/europe-west4/models/small-student"
KEY = "projects/p/locations/l/keyRings/r/cryptoKeys/k"
Register = Callable[..., Any]


@pytest.fixture
def vertex(tmp_path: Path) -> Iterator[Loopback]:
    server = Loopback(tmp_path, tls=True)
    yield server
    server.close()


@pytest.fixture
def register(vertex: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """The stage on a model at a URI; gives what it returns and the artifact that it fills."""
    key = vertex.service_account(tmp_path / "key.json")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(vertex.bundle))

    def run(uri: str) -> tuple[Any, dsl.Artifact]:
        metadata = {"step": 6000, "positions": 1024, "metric val_loss_student@1024": 3.41234}
        metadata["digest"] = "sha256:0123"
        artifact = dsl.Artifact(name="registered", uri=str(tmp_path / "registered"))
        vars(global_config).update(vars(type(global_config)()))  # it keeps credentials
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            returned = register_model.python_func(
                model=dsl.Model(name="exported", uri=uri, metadata=metadata),
                model_name="small-student",
                project="p",
                region="europe-west4",
                serving_image="europe-docker.pkg.dev/p/r/vllm:1",
                registered=artifact,
                cmek_key=KEY,
                api_endpoint=f"localhost:{vertex.port}",
                api_transport="rest",
                labels={"team": "small-models"},
            )
        return returned, artifact

    return run


def test_the_first_version_the_next_and_a_stage_started_again(
    vertex: Loopback, register: Register
) -> None:
    (name, version), artifact = register("gs://b/run-1/exported")
    assert (name, version) == (NAME, "1")
    assert artifact.metadata["resourceName"] == NAME
    assert artifact.metadata["val_loss_student@1024"] == 3.41234
    assert artifact.metadata["digest"] == artifact.metadata["input model"] == "sha256:0123"
    (upload,) = [body for method, _, body in vertex.requests if method == "POST"]
    assert upload["modelId"] == "small-student"
    sent = upload["model"]
    assert sent["artifactUri"] == "gs://b/run-1/exported"
    assert sent["containerSpec"]["imageUri"] == "europe-docker.pkg.dev/p/r/vllm:1"
    assert sent["labels"] == {"team": "small-models", "step": "6000", "positions": "1024"}
    assert sent["versionDescription"] == "val_loss_student@1024 = 3.4123"
    assert sent["encryptionSpec"] == {"kmsKeyName": KEY}
    assert register("gs://b/run-1/exported")[0] == (NAME, "1")
    assert len(vertex.models[NAME]) == 1, "the answer was lost, not the model"
    assert register("gs://b/run-2/exported")[0] == (NAME, "2")
    last = [body for method, _, body in vertex.requests if method == "POST"][-1]
    assert last["parentModel"] == NAME
    assert "modelId" not in last


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((403, "PERMISSION_DENIED", "aiplatform.models.upload"), "aiplatform.models.upload"),
        ((400, "INVALID_ARGUMENT", "no such container"), "no such container"),
    ],
)
def test_a_refusal_is_one_line(
    vertex: Loopback, register: Register, refusal: tuple[int, str, str], message: str
) -> None:
    vertex.refusal = refusal
    with pytest.raises(LiquidError, match=message) as caught:
        register("gs://b/run-1/exported")
    assert str(caught.value).startswith(f"{NAME} cannot be registered")
    assert ("roles/aiplatform.user" in str(caught.value)) == (refusal[0] == 403)
    assert vertex.models == {}
