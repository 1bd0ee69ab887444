"""How the inputs of a training's component become settings of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kfp import dsl

from trainer.checkpoints.names import COMPILE_CACHE
from trainer.settings.config import SETTINGS
from trainer.settings.values import given
from trainer.storage.places import place


def settings_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training, those that `more_settings` has over the others.

    Args:
        inputs: of `components.train`, by name; those named as a setting are that setting.

    Raises:
        UsageError: a value is not of its setting's type.
    """
    more, initial, compiled = (inputs[name] for name in ("more_settings", "initial", "compiled"))
    settings = {name: value for name, value in inputs.items() if name in SETTINGS} | {
        "tokens_dir": _place(inputs["tokens"]),
        "output_gcs_uri": _place(inputs["checkpoints"]),
        "resume_gcs_uri": _place(initial) if initial else inputs["resume_gcs_uri"],
        "compile_cache": f"{_place(compiled)}/{COMPILE_CACHE}" if compiled else None,
        "T": inputs["temperature"],
        "grad_accum": inputs["grad_accum"] or None,
    }
    settings |= more
    if settings["grad_accum"] is not None and "global_batch" not in more:
        del settings["global_batch"]  # two names of one quantity
    return given(**settings)


def _place(artifact: dsl.Artifact) -> str:
    return place(artifact.uri, artifact.path)
