"""A student with learned positions as a stock Hugging Face GPT-2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.models.renaming import with_blocks
from trainer.models.student import StudentConfig

_NAMES = {
    "ln1.": "ln_1.",
    "ln2.": "ln_2.",
    "attn.in_proj_": "attn.c_attn.",
    "attn.out_proj.": "attn.c_proj.",
    "mlp.0.": "mlp.c_fc.",
    "mlp.2.": "mlp.c_proj.",
}


def gpt2_weights(weights: Mapping[str, Tensor], positions: int) -> dict[str, Tensor]:
    """A student's weights under the names of `transformers.GPT2LMHeadModel`.

    GPT-2 keeps its projections as ``Conv1D``, that is transposed.
    """
    others = {
        "transformer.wte.weight": weights["embed.weight"],
        "transformer.wpe.weight": weights["pos.weight"][:positions],
        "transformer.ln_f.weight": weights["ln_f.weight"],
        "transformer.ln_f.bias": weights["ln_f.bias"],
        "lm_head.weight": weights["lm_head.weight"],
    }

    def transposed(_: str, tensor: Tensor) -> Tensor:
        return tensor.T if tensor.ndim == 2 else tensor

    return with_blocks(others, weights, "transformer.h", _NAMES, transposed)


def gpt2_model(weights: Mapping[str, Tensor], config: StudentConfig, positions: int) -> Any:
    """A `transformers.GPT2LMHeadModel` that computes what a student with learned positions does.

    Args:
        weights: the student's.
        config: its shapes.
        positions: rows of the table to take, from the first on.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=positions,
        n_embd=config.d_model,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        n_inner=4 * config.d_model,
        activation_function="gelu",
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.device("meta"):
        model = GPT2LMHeadModel(gpt2)
    model = model.to_empty(device="cpu")
    model.load_state_dict(gpt2_weights(weights, positions), strict=True)
    return model.eval()
