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

    from google.cloud import aiplatform

    from components.lineage import DIGEST, Lineage
    from components.registry import newest_version

    told = {name: value for name, value in model.metadata.items() if value not in (None, "")}
    numbers = {n.removeprefix("metric "): v for n, v in told.items() if n.startswith("metric ")}
    shown = {name: str(told[name]) for name in ("step", "positions") if name in told}
    aiplatform.init(
        project=project,
        location=region,
        api_endpoint=api_endpoint or None,
        api_transport=api_transport or None,
    )
    version = newest_version(
        f"projects/{project}/locations/{region}/models/{model_name}",
        model.uri,
        serving_image=serving_image,
        about="; ".join(f"{name} = {value:.4f}" for name, value in numbers.items())[:1000],
        labels=labels | shown,
        key=cmek_key,
    )
    registered.uri = f"https://{region}-aiplatform.googleapis.com/v1/{version.resource_name}"
    Lineage(model=model).give(registered, told.get(DIGEST, ""))
    registered.metadata.update(numbers | {"resourceName": version.resource_name})
    return (version.resource_name, version.version_id)
