"""Versions of a model in the Vertex AI Model Registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.api_core import exceptions as api
from google.auth.exceptions import GoogleAuthError
from google.cloud import aiplatform

from trainer.runtime.errors import LiquidError


def newest_version(
    place: str, uri: str, *, serving_image: str, about: str, labels: Mapping[str, str], key: str
) -> Any:
    """The version of a model that lies at a URI, uploaded unless the newest one does already.

    The model is made with its first version. `aiplatform.init` comes before.

    Args:
        place: the model's full name.
        uri: of the files.
        serving_image: container that serves them.
        about: the version's description.
        labels: of the version.
        key: of Cloud KMS; empty is Google's own.

    Raises:
        LiquidError: the registry refuses it, or cannot be reached.
    """
    try:
        try:
            version = aiplatform.Model(place)
        except api.NotFound:
            version = None
        if version is not None and version.uri == uri:
            return version
        name = place.rpartition("/")[2]
        return aiplatform.Model.upload(
            display_name=name,
            model_id=name if version is None else None,
            parent_model=place if version is not None else None,
            artifact_uri=uri,
            serving_container_image_uri=serving_image,
            description="A distilled causal language model in Hugging Face format",
            version_description=about,
            labels=dict(labels),
            encryption_spec_key_name=key or None,
        )
    except (api.GoogleAPICallError, api.RetryError, GoogleAuthError) as error:
        reason = " ".join(str(getattr(error, "message", None) or error).split())[:300]
        role = "; the account that the stages run as needs roles/aiplatform.user"
        hint = role if isinstance(error, api.Forbidden) else ""
        raise LiquidError(f"{place} cannot be registered: {reason}{hint}") from None
