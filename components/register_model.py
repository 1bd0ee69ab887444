"""Put the exported student into the Vertex AI Model Registry."""

from typing import NamedTuple

from kfp import dsl

from components import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def register_model(
    model: dsl.Input[dsl.Model],
    model_name: str,
    project: str,
    region: str,
    serving_image: str,
    registered: dsl.Output[dsl.Artifact],
    cmek_key: str = "",
    api_endpoint: str = "",
    api_transport: str = "",
    labels: dict = {},  # noqa: B006 - kfp records the value itself
) -> NamedTuple("Registered", [("name", str), ("version", str)]):  # type: ignore[valid-type]
    """A new version of the model of that name, with its metrics; started again, it adds no other.

    The model is made with its first version.
    """
    from trainer.runtime.commands import start_stage

    start_stage()

    from google.api_core import exceptions as api
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import aiplatform

    from components.lineage import Lineage
    from trainer.runtime.errors import LiquidError

    told = {name: value for name, value in model.metadata.items() if value not in (None, "")}
    numbers = {n.removeprefix("metric "): v for n, v in told.items() if n.startswith("metric ")}
    shown = {name: str(told[name]) for name in ("step", "positions") if name in told}
    place = f"projects/{project}/locations/{region}/models/{model_name}"
    try:
        aiplatform.init(
            project=project,
            location=region,
            api_endpoint=api_endpoint or None,
            api_transport=api_transport or None,
        )
        try:
            version = aiplatform.Model(place)
        except api.NotFound:
            version = None
        known = version is not None
        if version is None or version.uri != model.uri:
            version = aiplatform.Model.upload(
                display_name=model_name,
                model_id=None if known else model_name,
                parent_model=place if known else None,
                artifact_uri=model.uri,
                serving_container_image_uri=serving_image,
                description="A distilled causal language model in Hugging Face format",
                version_description="; ".join(f"{n} = {v:.4f}" for n, v in numbers.items())[:1000],
                labels=labels | shown,
                encryption_spec_key_name=cmek_key or None,
            )
    except (api.GoogleAPICallError, api.RetryError, GoogleAuthError) as error:
        reason = " ".join(str(getattr(error, "message", None) or error).split())[:300]
        role = "; the account that the stages run as needs roles/aiplatform.user"
        hint = role if isinstance(error, api.Forbidden) else ""
        raise LiquidError(f"{place} cannot be registered: {reason}{hint}") from None
    registered.uri = f"https://{region}-aiplatform.googleapis.com/v1/{version.resource_name}"
    Lineage(model=model).give(registered, told.get("digest", ""))
    registered.metadata.update(numbers | {"resourceName": version.resource_name})
    return (version.resource_name, version.version_id)
