"""The stock Hugging Face architecture that computes what a student computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.models.gpt2.export import gpt2_model
from trainer.models.gpt_neox import gpt_neox_model
from trainer.models.student import StudentConfig


def stock_model(weights: Mapping[str, Tensor], config: StudentConfig, positions: int) -> Any:
    """A student as a model of `transformers`: GPT-2 with a learned table, GPT-NeoX where rotary.

    Args:
        weights: the student's.
        config: its shapes.
        positions: the longest context in tokens that the model takes.
    """
    make = gpt2_model if config.pos_embedding == "absolute" else gpt_neox_model
    return make(weights, config, positions)
