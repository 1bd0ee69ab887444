"""The fast GPT-2 body against the stock one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from tests.trainer.samples import lively_gpt2
from trainer.models.gpt2.body import MAX_GRAPHS, GPT2Body, supports
from trainer.runtime.errors import ModelError

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA graphs and kernels need a CUDA device"
)


def build(**changes: Any) -> GPT2LMHeadModel:
    shape = {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 3}
    return lively_gpt2(deviation=0.15, **shape | changes)


def stock(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The stock body's last hidden state, computed in ``dtype`` from the same weights."""
    body = copy.deepcopy(model.base_model).to(dtype)
    return body(input_ids=ids, use_cache=False).last_hidden_state


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 64)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 56}, {"activation_function": "gelu_pytorch_tanh"}, {"n_head": 6}],
    ids=str,
)
def test_computes_what_the_stock_body_computes(
    shape: tuple[int, int], changes: dict[str, Any]
) -> None:
    model = build(**changes)
    ids = torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(1))
    for own in (model, model.base_model):
        assert supports(own)
        found = GPT2Body(own)(ids)
        assert found.shape == (*shape, 96)
        assert error(found, stock(model, ids, torch.float64)) <= 1e-6


def test_shapes_may_grow_and_shrink() -> None:
    model = build()
    body = GPT2Body(model)
    for shape in ((2, 5), (4, 33), (1, 3), (2, 5)):
        ids = torch.randint(0, 211, shape, generator=torch.Generator().manual_seed(sum(shape)))
        assert error(body(ids), stock(model, ids, torch.float64)) <= 1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"activation_function": "gelu"},
        {"activation_function": "relu"},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
        {"add_cross_attention": True},
    ],
    ids=str,
)
def test_other_functions_are_left_to_the_stock_body(changes: dict[str, Any]) -> None:
    model = build(**changes)
    assert not supports(model)
    with pytest.raises(ModelError, match="not a GPT-2 that the fast body computes"):
        GPT2Body(model)


def test_other_models_and_types_are_left_to_the_stock_body() -> None:
    model = build()

    class Changed(GPT2LMHeadModel):
        pass

    assert not supports(Changed(model.config))
    assert not supports(torch.nn.Linear(2, 2))
    assert not supports(model.double())


def test_ids_past_the_position_table_are_one_clear_error() -> None:
    with pytest.raises(ModelError, match="65 tokens are more than the 64 positions"):
        GPT2Body(build())(torch.zeros(1, 65, dtype=torch.long))


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("layers", "width", "heads", "shape"), [(3, 96, 3, (3, 17)), (12, 800, 25, (8, 512))]
)
def test_no_less_exact_than_the_stock_body(
    layers: int, width: int, heads: int, shape: tuple[int, int]
) -> None:
    model = build(n_embd=width, n_layer=layers, n_head=heads, n_positions=512)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and not name.startswith(("transformer.wte", "transformer.wpe")):
            parameter.normal_(0.0, parameter.shape[0] ** -0.5)
    model = model.cuda().bfloat16()
    ids = torch.randint(0, 211, shape, device="cuda")
    exact = stock(model, ids, torch.float64)
    body = GPT2Body(model)
    kernels, captured, replayed = body(ids), body(ids), body(ids)
    own, theirs = error(kernels, exact), error(stock(model, ids, torch.bfloat16), exact)
    print(f"relative error of the hidden state: {own:.2e}, stock bf16 {theirs:.2e}")
    assert own <= 1.2 * theirs
    assert torch.equal(captured, kernels)
    assert torch.equal(replayed, kernels)


@needs_gpu
@pytest.mark.gpu
def test_fp32_matches_fp64() -> None:
    model = build().cuda()
    ids = torch.randint(0, 211, (3, 50), device="cuda")
    exact = stock(model, ids, torch.float64)
    body = GPT2Body(model)
    for _ in range(3):
        assert error(body(ids), exact) <= 1e-5


@needs_gpu
@pytest.mark.gpu
def test_graphs_of_many_shapes_stay_apart() -> None:
    model = build().cuda()
    body = GPT2Body(model)
    shapes = [(2, 8 + extra) for extra in range(MAX_GRAPHS + 2)]
    for size in (*shapes, *shapes, *reversed(shapes), (4, 40), *shapes):
        ids = torch.randint(0, 211, size, device="cuda")
        before = body(ids)
        kept = before.clone()
        other = body(torch.randint(0, 211, size, device="cuda"))
        assert torch.equal(before, kept), "a later call overwrote an earlier result"
        assert not torch.equal(before, other)
        assert error(before, stock(model, ids, torch.float64)) <= 1e-5
