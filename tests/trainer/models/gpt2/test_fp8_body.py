"""The fp8 GPT-2 body against the stock model with its operands rounded to fp8."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tests.trainer.samples import lively_gpt2
from trainer.models.fast_bodies import quantize_teacher
from trainer.models.gpt2.body import GPT2Body
from trainer.models.gpt2.fp8_body import GPT2Fp8Body, quantize
from trainer.runtime.devices import has_fp8
from trainer.runtime.errors import ModelError, UsageError
from trainer.settings.config import TrainConfig
from trainer.training.precision import choose_precision

needs_fp8 = pytest.mark.skipif(
    not has_fp8(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    reason="fp8 products need a CUDA device of compute capability 8.9 or above",
)


def build(width: int = 96, heads: int = 6, layers: int = 3, **changes: Any) -> GPT2LMHeadModel:
    shape = {"vocab_size": 208, "n_embd": width, "n_layer": layers, "n_head": heads}
    return lively_gpt2(deviation=1.5 / width**0.5, **shape | changes)


def draw(*shape: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(0, 208, shape, generator=generator).to(device)


def rounded(rows: Tensor) -> Tensor:
    """Each row to the nearest e4m3 numbers of a grid whose largest is the row's largest."""
    scale = rows.abs().amax(-1, keepdim=True) / 448.0
    scaled = rows / scale
    # e4m3: 3 bits after the leading one, exponents from -6; below, steps of 2^-9
    step = torch.exp2(torch.floor(torch.log2(scaled.abs().clamp(min=2.0**-6))) - 3)
    return torch.round(scaled / step) * step * scale


def with_rounded_operands(model: Any, ids: Tensor) -> Tensor:
    """The stock body in fp64, operands of the products in question rounded as fp8 would."""
    body = copy.deepcopy(model.base_model).double()
    for name, module in body.named_modules():
        if isinstance(module, Conv1D) and not name.endswith("attn.c_proj"):
            module.weight.copy_(rounded(module.weight.T).T)
            module.register_forward_pre_hook(lambda _, inputs: (rounded(inputs[0]),))
    return body(input_ids=ids, use_cache=False).last_hidden_state


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 64)])
@pytest.mark.parametrize("changes", [{}, {"n_inner": 64}], ids=str)
def test_computes_what_rounded_operands_give(
    shape: tuple[int, int], changes: dict[str, Any]
) -> None:
    model, ids = build(**changes), draw(*shape)
    found = GPT2Fp8Body(model)(ids)
    exact = copy.deepcopy(model.base_model).double()(input_ids=ids, use_cache=False)
    rounding = error(found, exact.last_hidden_state)
    assert 1e-2 < rounding < 0.15
    # fp32 and fp64 take a number between two fp8 numbers to different sides now and then
    assert error(found, with_rounded_operands(model, ids)) <= 0.15 * rounding


def test_shapes_may_grow_and_shrink() -> None:
    model = build()
    body = GPT2Fp8Body(model)
    for shape in ((2, 5), (4, 33), (1, 3), (2, 5)):
        ids = draw(*shape)
        assert error(body(ids), with_rounded_operands(model, ids)) <= 1e-2


def test_quantized_rows() -> None:
    rows = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    rows[1] = 0.0
    rows[2] *= 1e30
    rows[3] *= 1e-9
    rows[4, 5] = 1e4
    quantized = quantize(rows)
    found = quantized.values.double() * quantized.scales.double()
    assert (found[1] == 0).all()
    largest = rows.abs().amax(1, keepdim=True)
    # Half a step of 3 bits, or of the smallest step where a number is small beside its row
    limit = torch.maximum(rows.abs() * 2.0**-4, largest / 448.0 * 2.0**-10) * 1.001
    assert ((found - rows).abs() <= limit).all()


def test_error_is_measured_as_defined() -> None:
    model, ids = build().to(torch.bfloat16), draw(3, 50)
    head = model.lm_head.weight.detach()
    exact = GPT2Body(model)(ids)
    body, measured = quantize_teacher(model, head, ids)
    narrow = body(ids)
    log_p, log_q = (F.linear(h.double(), head.double()).log_softmax(-1) for h in (exact, narrow))
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert measured.divergence == pytest.approx(float(divergence), rel=1e-4)
    assert measured.same_choice == pytest.approx(
        float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    )
    assert measured.hidden == pytest.approx(error(narrow, exact), rel=1e-4)
    assert measured.divergence > 1e-4


def test_the_model_gives_up_its_weights() -> None:
    model = build().to(torch.bfloat16)
    before = sum(p.numel() for p in model.parameters())
    body, _ = quantize_teacher(model, model.lm_head.weight.detach(), draw(1, 8))
    in_fp8 = sum(
        weights.values.numel()
        for layer in body.fp8_layers
        for weights in (layer.qkv, layer.expand, layer.contract)
    )
    assert in_fp8 == 3 * 96 * 96 * (3 + 4 + 4)
    assert sum(p.numel() for p in model.parameters()) == before - in_fp8


def test_models_without_an_fp8_form() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for model, words in (
        (llama.to(torch.bfloat16), "LlamaForCausalLM has no fp8 form"),
        (build(), "only GPT-2 in bf16"),
        (build(width=40, heads=2).to(torch.bfloat16), "that 16 divides, not 40"),
    ):
        with pytest.raises(ModelError, match=words):
            quantize_teacher(model, model.lm_head.weight, draw(1, 4))


def test_settings_that_exclude_fp8() -> None:
    settings: dict[str, Any] = {"teacher_precision": "fp8", "block_size": 8}
    with pytest.raises(UsageError, match="exclude each other"):
        TrainConfig(**settings, shard_teacher=True)
    with pytest.raises(UsageError, match=r"8\.9 or above.*use bf16"):
        choose_precision(TrainConfig(**settings), torch.device("cpu"))


@needs_fp8
@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (8, 64)])
@pytest.mark.parametrize("width", [96, 320])
def test_kernels_compute_what_plain_operations_compute(shape: tuple[int, int], width: int) -> None:
    model, ids = build(width, heads=4).to(torch.bfloat16), draw(*shape)
    expected = with_rounded_operands(model, ids)
    plain = error(GPT2Fp8Body(model)(ids), expected)
    body = GPT2Fp8Body(copy.deepcopy(model).cuda())
    # Kernel by kernel, captured, replayed
    for _ in range(3):
        found = error(body(ids.cuda()), expected)
        assert found <= max(1.5 * plain, 2e-2)


@needs_fp8
@pytest.mark.gpu
def test_error_on_the_gpu_is_that_on_the_cpu() -> None:
    model, ids = build(width=320, heads=4).to(torch.bfloat16), draw(8, 64)
    on_gpu = copy.deepcopy(model).cuda()
    _, expected = quantize_teacher(model, model.lm_head.weight.detach(), ids)
    _, found = quantize_teacher(on_gpu, on_gpu.lm_head.weight.detach(), ids.cuda())
    assert found.divergence == pytest.approx(expected.divergence, rel=0.2)
    assert found.hidden == pytest.approx(expected.hidden, rel=0.1)
