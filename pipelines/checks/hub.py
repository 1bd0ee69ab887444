"""What the Hugging Face hub says of a teacher or a data set, and whether the stages can read it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.checks.findings import Check, Finding
from pipelines.vertex import first_line
from trainer.models.hugging_face import looks_local
from trainer.runtime.errors import LiquidError
from trainer.storage.places import is_remote

Kind = Literal["model", "dataset"]

_SECONDS = 15.0


class HubSilentError(LiquidError):
    """The hub could not be asked, or did not answer the question."""


def on_hub(name: str) -> bool:
    """Whether a teacher or data set is named as on the hub, not by a place."""
    return not (looks_local(name) or is_remote(name))


def client() -> HfApi:
    """The hub that ``HF_ENDPOINT`` names, which the library reads only when it is imported."""
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def ask_hub(kind: Kind, name: str, revision: str | None = None) -> Any:
    """What the hub says of a model or data set: ``sha``, its commit, ``gated`` and ``private``.

    Args:
        kind: of the two.
        name: on the hub.
        revision: a branch, tag or commit; None is the newest commit.

    Raises:
        GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError: it may not be read by this
            machine's token, or is not there.
        HubSilentError: the hub does not say.
    """
    hub = client()
    look = hub.model_info if kind == "model" else hub.dataset_info
    try:
        return look(name, revision=revision, timeout=_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError):  # the former of gated ones too
        raise
    except OfflineModeIsEnabled:
        raise HubSilentError("HF_HUB_OFFLINE is set") from None
    except Exception as error:  # noqa: BLE001 - releases of the library differ in their HTTP client
        raise HubSilentError(f"the hub did not say ({first_line(error)})") from None


def hub_checks(parameters: Mapping[str, Any]) -> dict[str, Check]:
    """The checks of what the parameters name; no name, no check.

    Args:
        parameters: all of the pipeline's, defaults among them; what they name in a bucket is
            `pipelines.checks.places`' to look at.
    """
    token = bool(parameters.get("hf_secret_name"))
    named = {
        "teacher": ("model", str(parameters["teacher_name"]), parameters["teacher_revision"]),
        "data set": ("dataset", str(parameters["dataset_name"]), parameters["dataset_revision"]),
    }
    return {
        check: partial(_look, check, kind, name, revision or None, token)  # type: ignore[arg-type]
        for check, (kind, name, revision) in named.items()
        if name and not is_remote(name)
    }


def _look(
    check: str,
    kind: Kind,
    name: str,
    revision: str | None,
    has_secret: bool,
) -> Finding:
    if not on_hub(name):
        return Finding(check, "unchecked", f"{name} is not on the Hugging Face hub")
    parameter = "teacher_name" if kind == "model" else "dataset_name"
    private = "the token of hf_secret_name may open it, yours does not"
    give = "gcloud secrets create hf-token --data-file=-  # the token; then give hf_secret_name="
    try:
        info = ask_hub(kind, name, revision)
        if info.gated:
            client().auth_check(name, repo_type=kind)
    except GatedRepoError:
        if has_secret:
            return Finding(check, "unchecked", f"{name} asks for permission; {private}")
        said = f"{name} asks for permission, which you get at {client().endpoint}/{name}"
        return Finding(check, "failed", said, give)
    except RevisionNotFoundError:
        said = f"{name} has no revision {revision!r}"
        another = parameter.replace("_name", "_revision")
        return Finding(check, "failed", said, f"give another {another} in PARAMS")
    except RepositoryNotFoundError:
        if has_secret:
            return Finding(check, "unchecked", f"{name} is private or absent; {private}")
        said = f"there is no {kind} {name!r} on the hub that everyone may read"
        return Finding(check, "failed", said, f"give another {parameter} in PARAMS, or {give}")
    except HubSilentError as error:
        return Finding(check, "unchecked", str(error))
    except HfHubHTTPError as error:
        return Finding(check, "unchecked", f"the hub did not say ({first_line(error)})")
    needs_token = info.gated or info.private
    if needs_token and not has_secret:
        said = f"{name} is open to your token, but the stages have none"
        return Finding(check, "failed", said, give)
    return Finding(check, "fine", f"{name} is there")
