"""Any Hugging Face causal language model, whole and checked before it is loaded."""

from __future__ import annotations

import os
from typing import Any

import torch

from trainer.models.hugging_face import locate, readable_errors
from trainer.models.local_files import check_weights
from trainer.models.pretrained import Pretrained
from trainer.runtime.errors import ModelError
from trainer.runtime.log import log


def load_causal_lm(
    what: str,
    model: str | Pretrained,
    *,
    dtype: torch.dtype,
    device: torch.device,
    token: str | None = None,
) -> Any:
    """A model of `transformers` on ``device`` in ``dtype``; no code of its own is run.

    Args:
        what: what messages call it: teacher, student.
        model: by hub name, local or ``gs://`` directory.
        dtype: of its weights.
        device: where they go.
        token: for the Hugging Face hub.

    Raises:
        ModelError: the weights cannot be loaded, are of other shapes than the configuration says,
            or some are missing.
        StorageError: its directory cannot be read or fetched, or is not of its revision.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    located = locate(model, "weights", what)
    name = located.model.name
    if os.path.isdir(located.path):
        with readable_errors(what, name):
            config = AutoConfig.from_pretrained(located.path, trust_remote_code=False)
            check_weights(f"{what} {name!r}", located.path, config)
    with readable_errors(what, name):
        loaded, info = AutoModelForCausalLM.from_pretrained(
            located.path,
            dtype=dtype,
            token=token,
            trust_remote_code=False,
            output_loading_info=True,
            # `_check_whole` refuses them and names one; transformers would not
            ignore_mismatched_sizes=True,
            **located.options,
        )
    _check_whole(f"{what} {name!r}", info)
    loaded = loaded.to(device)
    parameters = sum(p.numel() for p in loaded.parameters())
    log.info("%s %s: %.1f M parameters in %s", what, name, parameters / 1e6, dtype)
    return loaded


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
