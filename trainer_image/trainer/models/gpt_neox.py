"""A student with rotary positions as a stock Hugging Face GPT-NeoX.

With its residuals one after the other, all of each head rotated and exact GELU, GPT-NeoX (Black et
al., 2022, arXiv:2204.06745) is the student's architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trainer.models.renaming import with_blocks
from trainer.models.student import ROPE_BASE, StudentConfig

_NAMES = {
    "ln1.": "input_layernorm.",
    "ln2.": "post_attention_layernorm.",
    "attn.in_proj_": "attention.query_key_value.",
    "attn.out_proj.": "attention.dense.",
    "mlp.0.": "mlp.dense_h_to_4h.",
    "mlp.2.": "mlp.dense_4h_to_h.",
}


def gpt_neox_weights(
    weights: Mapping[str, Tensor], n_heads: int, head: str = "lm_head"
) -> dict[str, Tensor]:
    """A student's weights under the names of `transformers.GPTNeoXForCausalLM`.

    GPT-NeoX keeps query, key and value of one head together; the student all queries, then all
    keys, then all values. The output head's name, ``head``, is another one in some releases.
    """

    def by_head(part: str, tensor: Tensor) -> Tensor:
        if part != "attn.in_proj_":
            return tensor
        apart = tensor.reshape(3, n_heads, -1, *tensor.shape[1:]).transpose(0, 1)
        return apart.reshape(tensor.shape)

    others = {
        "gpt_neox.embed_in.weight": weights["embed.weight"],
        "gpt_neox.final_layer_norm.weight": weights["ln_f.weight"],
        "gpt_neox.final_layer_norm.bias": weights["ln_f.bias"],
        f"{head}.weight": weights["lm_head.weight"],
    }
    return with_blocks(others, weights, "gpt_neox.layers", _NAMES, by_head)


def gpt_neox_model(weights: Mapping[str, Tensor], config: StudentConfig, positions: int) -> Any:
    """A `transformers.GPTNeoXForCausalLM` that computes what the rotary student computes.

    Args:
        weights: the student's.
        config: its shapes and ``rope_scale``.
        positions: the longest context in tokens that the model says it takes.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    rope: dict[str, Any] = {"rope_theta": ROPE_BASE, "partial_rotary_factor": 1.0}
    if config.rope_scale == 1.0:
        rope["rope_type"] = "default"
    else:
        rope |= {"rope_type": "linear", "factor": config.rope_scale}
    stock = GPTNeoXConfig(
        vocab_size=config.vocab_size,
        max_position_embeddings=positions,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=4 * config.d_model,
        hidden_act="gelu",
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        layer_norm_eps=1e-5,
        use_parallel_residual=False,
        attention_bias=True,
        rope_parameters=rope,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Not on the meta device: the rotations' frequencies are no weights, and would stay there
    model = GPTNeoXForCausalLM(stock)
    output = model.get_output_embeddings()
    head = next(name for name, module in model.named_modules() if module is output)
    model.load_state_dict(gpt_neox_weights(weights, config.n_heads, head), strict=True)
    return model.eval()
