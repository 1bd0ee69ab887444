"""Whether the stages can read the teacher and the data set on the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import httpx
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pipelines.checks.findings import Check, Finding
from pipelines.vertex import first_line

_SECONDS = 15.0


def hub_checks(parameters: Mapping[str, Any]) -> dict[str, Check]:
    """The checks of what the parameters name; no name, no check.

    Args:
        parameters: all of the pipeline's, defaults among them.
    """
    token = bool(parameters.get("hf_secret_name"))
    named = {
        "teacher": ("model", str(parameters["teacher_name"]), None),
        "data set": ("dataset", str(parameters["dataset_name"]), parameters["dataset_revision"]),
    }
    return {
        check: partial(_look, check, kind, name, revision or None, token)  # type: ignore[arg-type]
        for check, (kind, name, revision) in named.items()
        if name
    }


def _look(
    check: str,
    kind: Literal["model", "dataset"],
    name: str,
    revision: str | None,
    has_secret: bool,
) -> Finding:
    if name.startswith(("/", ".", "~", "gs://")):
        return Finding(check, "unchecked", f"{name} is not on the Hugging Face hub")
    # The library reads the variable once, when it is imported
    hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
    parameter = "teacher_name" if kind == "model" else "dataset_name"
    private = "the token of hf_secret_name may open it, yours does not"
    give = "gcloud secrets create hf-token --data-file=-  # the token; then give hf_secret_name="
    try:
        if kind == "model":
            info: Any = hub.model_info(name, revision=revision, timeout=_SECONDS)
        else:
            info = hub.dataset_info(name, revision=revision, timeout=_SECONDS)
        if info.gated:
            hub.auth_check(name, repo_type=kind)
    except GatedRepoError:
        if has_secret:
            return Finding(check, "unchecked", f"{name} asks for permission; {private}")
        said = f"{name} asks for permission, which you get at {hub.endpoint}/{name}"
        return Finding(check, "failed", said, give)
    except RevisionNotFoundError:
        said = f"{name} has no revision {revision!r}"
        return Finding(check, "failed", said, "give another dataset_revision in PARAMS")
    except RepositoryNotFoundError:
        if has_secret:
            return Finding(check, "unchecked", f"{name} is private or absent; {private}")
        said = f"there is no {kind} {name!r} on the hub that everyone may read"
        return Finding(check, "failed", said, f"give another {parameter} in PARAMS, or {give}")
    except (HfHubHTTPError, httpx.HTTPError) as error:
        return Finding(check, "unchecked", f"the hub did not say ({first_line(error)})")
    needs_token = info.gated or info.private
    if needs_token and not has_secret:
        said = f"{name} is open to your token, but the stages have none"
        return Finding(check, "failed", said, give)
    return Finding(check, "fine", f"{name} is there")
