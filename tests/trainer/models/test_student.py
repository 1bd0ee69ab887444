"""The student against stock implementations with the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from trainer.checkpoints.checkpoint import Checkpoint
from trainer.models.gpt2.export import gpt2_model
from trainer.models.stock import stock_model
from trainer.models.student import (
    Student,
    StudentConfig,
    expected_shapes,
    rotary_tables,
    rotate,
)
from trainer.runtime.errors import CheckpointError

ABSOLUTE = StudentConfig(vocab_size=997, d_model=96, n_layers=3, n_heads=6, positions=1024)
ROTARY = StudentConfig(
    vocab_size=997, d_model=96, n_layers=3, n_heads=6, positions=0, pos_embedding="rotary"
)


def noisy(config: StudentConfig) -> Student:
    """Weights far from initialization, so that every bias and norm takes part."""
    student = Student(config).initialize(3)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student.eval()


@pytest.mark.parametrize("length", [1, 17, 512, 1024])
def test_logits_match_stock_gpt2(length: int) -> None:
    student = noisy(ABSOLUTE)
    stock = gpt2_model(student.state_dict(), ABSOLUTE, 1024)
    ids = torch.randint(0, 997, (2, length), generator=torch.Generator().manual_seed(length))
    with torch.no_grad():
        difference = (student.logits(ids) - stock(ids).logits).abs().max()
    assert float(difference) <= 1e-4


def test_logits_match_stock_gpt2_at_the_base_size() -> None:
    """10 layers, 768 wide, 12 heads: the shapes of the base package, at its 512 tokens."""
    config = StudentConfig(vocab_size=2003, d_model=768, n_layers=10, n_heads=12, positions=512)
    student = noisy(config)
    stock = gpt2_model(student.state_dict(), config, 512)
    ids = torch.randint(0, 2003, (1, 512), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(ids).logits
        difference = (student.logits(ids) - expected).abs().max() / expected.abs().max()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize("scale", [1.0, 1.7, 2.0])
def test_logits_match_stock_gpt_neox(scale: float) -> None:
    config = replace(ROTARY, rope_scale=scale)
    student = noisy(config)
    stock = stock_model(student.state_dict(), config, 1024)
    assert type(stock).__name__ == "GPTNeoXForCausalLM"
    ids = torch.randint(0, 997, (2, 1024), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        difference = (student.logits(ids) - stock(ids).logits).abs().max()
    assert float(difference) <= 1e-5


@pytest.mark.parametrize("config", [ABSOLUTE, ROTARY], ids=["absolute", "rotary"])
def test_changing_a_token_changes_no_logit_before_it(config: StudentConfig) -> None:
    student = noisy(config)
    ids = torch.randint(0, 997, (1, 40), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 23] = (changed[0, 23] + 1) % 997
    with torch.no_grad():
        before, after = student.logits(ids), student.logits(changed)
    assert torch.equal(before[:, :23], after[:, :23])
    assert not torch.allclose(before[:, 23:], after[:, 23:])


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_rotary_positions_match_stock_llama(scale: float) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    heads, width, length = 4, 16, 33
    config = LlamaConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "linear", "factor": scale, "rope_theta": 10000.0},
    )
    x = torch.randn(2, heads, length, width)
    cosine, sine = LlamaRotaryEmbedding(config)(x, torch.arange(length)[None])
    expected, _ = apply_rotary_pos_emb(x, x, cosine, sine)
    found = rotate(x, *rotary_tables(length, width, scale, x.device))
    assert torch.allclose(found, expected, atol=1e-5)


def test_rotary_attention_depends_on_distance_alone() -> None:
    tables = rotary_tables(50, 16, 1.0, torch.device("cpu"))
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    turned_q = rotate(query.expand(1, 1, 50, 16), *tables)[0, 0]
    turned_k = rotate(key.expand(1, 1, 50, 16), *tables)[0, 0]
    scores = turned_q @ turned_k.T
    assert torch.allclose(scores[10, 3], scores[47, 40], atol=1e-4)
    assert not torch.allclose(scores[10, 3], scores[10, 4], atol=1e-4)


def test_parameter_names_shapes_and_order_are_the_base_packages() -> None:
    config = StudentConfig(50257, 768, 10, 12, 4096)
    shapes = expected_shapes(config)
    block = {
        "ln1.weight": (768,),
        "ln1.bias": (768,),
        "attn.in_proj_weight": (2304, 768),
        "attn.in_proj_bias": (2304,),
        "attn.out_proj.weight": (768, 768),
        "attn.out_proj.bias": (768,),
        "ln2.weight": (768,),
        "ln2.bias": (768,),
        "mlp.0.weight": (3072, 768),
        "mlp.0.bias": (3072,),
        "mlp.2.weight": (768, 3072),
        "mlp.2.bias": (768,),
    }
    expected = {"embed.weight": (50257, 768), "pos.weight": (4096, 768)}
    expected |= {f"blocks.{i}.{name}": shape for i in range(10) for name, shape in block.items()}
    expected |= {"ln_f.weight": (768,), "ln_f.bias": (768,), "lm_head.weight": (50257, 768)}
    assert list(shapes.items()) == list(expected.items())


@pytest.mark.parametrize("config", [ABSOLUTE, ROTARY], ids=["absolute", "rotary"])
def test_shapes_tell_the_configuration(config: StudentConfig) -> None:
    weights = Student(config).state_dict()
    assert Checkpoint("x.pt", weights).student_config(n_heads=6) == config


def test_state_dicts_of_other_models_are_refused() -> None:
    weights = Student(ABSOLUTE).state_dict()
    with pytest.raises(CheckpointError, match=r"no embed.weight"):
        Checkpoint("x.pt", {"wte.weight": torch.zeros(2, 2)}).student_config(n_heads=1)
    with pytest.raises(CheckpointError, match="5 heads do not divide"):
        Checkpoint("x.pt", weights).student_config(n_heads=5)
    gap = {name.replace("blocks.1.", "blocks.7."): value for name, value in weights.items()}
    with pytest.raises(CheckpointError, match="without a gap"):
        Checkpoint("x.pt", gap).student_config(n_heads=6)


def test_initialization_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = Student(ABSOLUTE).initialize(7).state_dict()
    torch.manual_seed(99)
    again = Student(ABSOLUTE).initialize(7).state_dict()
    other = Student(ABSOLUTE).initialize(8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])
