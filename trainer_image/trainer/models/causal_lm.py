"""Any Hugging Face causal language model, whole and checked before it is loaded."""

from __future__ import annotations

import os
from typing import Any

import torch

from trainer.models.hugging_face import location_of, readable_errors
from trainer.models.local_files import check_weights
from trainer.runtime.errors import ModelError
from trainer.runtime.log import log


def load_causal_lm(
    what: str, name: str, *, dtype: torch.dtype, device: torch.device, token: str | None = None
) -> Any:
    """A model of `transformers` on ``device`` in ``dtype``; no code of its own is run.

    Args:
        what: what messages call it: teacher, student.
        name: hub name or directory.
        dtype: of its weights.
        device: where they go.
        token: for the Hugging Face hub.

    Raises:
        ModelError: the weights cannot be loaded, are of other shapes than the configuration says,
            or some are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    location = location_of(what, name)
    if os.path.isdir(location):
        with readable_errors(what, name):
            config = AutoConfig.from_pretrained(location, trust_remote_code=False)
            check_weights(f"{what} {name!r}", location, config)
    with readable_errors(what, name):
        model, info = AutoModelForCausalLM.from_pretrained(
            location,
            dtype=dtype,
            token=token,
            trust_remote_code=False,
            output_loading_info=True,
            # `_check_whole` refuses them and names one; transformers would not
            ignore_mismatched_sizes=True,
        )
    _check_whole(f"{what} {name!r}", info)
    model = model.to(device)
    parameters = sum(p.numel() for p in model.parameters())
    log.info("%s %s: %.1f M parameters in %s", what, name, parameters / 1e6, dtype)
    return model


def _check_whole(what: str, info: dict[str, Any]) -> None:
    """Refuse weights that `transformers` has replaced by random ones."""
    if info["missing_keys"]:
        absent = sorted(map(str, info["missing_keys"]))
        raise ModelError(f"{what} lacks {len(absent)} of its weights, {absent[0]} for one")
    if info.get("mismatched_keys"):
        tensor, shape, configured = min(info["mismatched_keys"])
        raise ModelError(
            f"{what}: {tensor} has shape {list(shape)}, but its config.json needs"
            f" {list(configured)}; they are of different models"
        )
