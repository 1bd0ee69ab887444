"""Teachers of several architectures, as stock `transformers` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trainer.errors import ModelError
from trainer.teacher import load_teacher, load_tokenizer, read_teacher_spec

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def saved(model: Any, directory: Path) -> Path:
    model.save_pretrained(str(directory))
    return directory


def load(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    spec = read_teacher_spec(str(directory))
    return load_teacher(spec, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize(
    "model",
    [
        LlamaForCausalLM(LlamaConfig(**SMALL)),
        CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
        GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=128, n_embd=32, n_layer=2, n_head=4)),
    ],
    ids=["llama", "cohere with a logit scale", "gpt2, tied"],
)
def test_hidden_state_and_head_give_the_models_logits(model: Any, tmp_path: Path) -> None:
    directory = saved(model, tmp_path / "teacher")
    teacher = load(directory)
    assert teacher.spec.max_context == 128
    assert teacher.spec.vocab_size == 96
    ids = torch.randint(0, 96, (2, 20))
    with torch.no_grad():
        expected = model.eval()(ids).logits
    found = F.linear(teacher.hidden(ids), teacher.head, teacher.bias)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_teacher_that_caps_its_logits_is_refused(tmp_path: Path) -> None:
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.05)
    directory = saved(Gemma2ForCausalLM(config), tmp_path / "gemma")
    with pytest.raises(ModelError, match="does more to its logits than a linear head"):
        load(directory)


def test_precision_is_the_one_asked_for(tmp_path: Path) -> None:
    directory = saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "teacher")
    teacher = load(directory, torch.bfloat16)
    assert {p.dtype for p in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.hidden(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


def test_missing_weights_are_not_filled_in_silently(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    directory = saved(LlamaForCausalLM(LlamaConfig(**SMALL)), tmp_path / "teacher")
    weights = load_file(directory / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, .*layers.1.mlp.up_proj.weight"):
        load(directory)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match="computes logits that are not finite"):
        load(saved(model, tmp_path / "teacher"))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, tokenizer_dir: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_dir / "tokenizer.json"))
    tokenizer.save_pretrained(str(tmp_path / "bare"))
    with pytest.raises(ModelError, match="has no EOS token"):
        load_tokenizer(str(tmp_path / "bare"))


@pytest.mark.parametrize("name", ["/no/such/place", "no-such-owner/no-such-model", "bad name!", ""])
def test_names_that_lead_nowhere_are_one_line(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_teacher_spec(name)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "/no-such" not in name:  # the hub's client tries an unreachable hub for a minute
        with pytest.raises(ModelError):
            load_tokenizer(name)
