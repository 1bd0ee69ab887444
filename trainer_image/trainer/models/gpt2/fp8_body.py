"""A GPT-2 body with most of its products in fp8: for a frozen teacher, faster and half the size.

Query, key and value and both products of the MLP multiply fp8 numbers (e4m3; Micikevicius et al.,
2022, arXiv:2209.05433), each token's activations and each output channel's weights with a scale of
their own, and accumulate in fp32. The attention's output product, attention itself, embeddings
and the residual stream stay in bf16. Between the products run two kernels that also quantize: the
layer norm, which adds the MLP's output to the stream on the way, and GELU.

That changes what the teacher predicts. `trainer.models.fast_bodies.quantize_teacher` measures by
how much, on the user's own text, before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.gpt2.body import GPT2Body, Layer, Norm, Workspace
from trainer.runtime.errors import ModelError

FP8 = torch.float8_e4m3fn

LARGEST = torch.finfo(FP8).max

_ALIGNMENT = 16

_SMALLEST_ROW = 1e-12
"""Keeps the scale of a row of zeros from being zero."""


@dataclass(frozen=True)
class Quantized:
    """Rows in fp8, each with its scale."""

    values: Tensor
    """``[N, K]`` in fp8."""
    scales: Tensor
    """``[N, 1]`` in fp32: value · scale is the number that stands for the original."""

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Quantized:
        """``rows`` uninitialized rows."""
        return cls(
            torch.empty(rows, width, dtype=FP8, device=device),
            torch.empty(rows, 1, dtype=torch.float32, device=device),
        )

    def rows(self, count: int) -> Quantized:
        """The first ``count`` rows."""
        return Quantized(self.values[:count], self.scales[:count])

    def fill(self, source: Tensor) -> Quantized:
        """Quantize ``[N, K]`` into these rows, the largest of each to the largest number of fp8."""
        wide = source.float()
        torch.clamp_min(wide.abs().amax(1, keepdim=True), _SMALLEST_ROW, out=self.scales)
        self.scales.div_(LARGEST)
        self.values.copy_(wide / self.scales)
        return self


def quantize(source: Tensor) -> Quantized:
    """``[N, K]`` in fp8 with a scale for each row."""
    return Quantized.empty(source.shape[0], source.shape[1], source.device).fill(source)


def product(left: Quantized, right: Quantized, bias: Tensor | None, out: Tensor) -> None:
    """``out = left · rightᵀ + bias`` with ``left`` ``[N, K]``, ``right`` ``[M, K]``."""
    if out.device.type == "cuda":
        torch._scaled_mm(
            left.values,
            right.values.T,
            scale_a=left.scales,
            scale_b=right.scales.T,
            bias=bias,
            out_dtype=out.dtype,
            use_fast_accum=True,
            out=out,
        )
        return
    wide = F.linear(left.values.float(), right.values.float()) * left.scales * right.scales.T
    out.copy_(wide if bias is None else wide + bias.float())


class _Fp8Workspace(Workspace):
    def __init__(self, tokens: int, width: int, inner: int, like: Tensor) -> None:
        super().__init__(tokens, width, inner, like)
        self.quantized = [Quantized.empty(tokens, size, like.device) for size in (width, inner)]


class GPT2Fp8Body(GPT2Body):
    """A `GPT2Body` with fp8 copies of most weights.

    Args:
        model: a model that `supports` accepts.
        release: drop the copied weights from the model, which then cannot be used any more.

    Raises:
        ModelError: the model is not supported, or a width of it is no multiple of 16.
    """

    workspace_type = _Fp8Workspace

    def __init__(self, model: Any, *, release: bool = False) -> None:
        super().__init__(model)
        _check_widths(model.base_model)
        self.fp8_layers: list[Layer[Quantized]] = [
            Layer(
                norm_1=layer.norm_1,
                qkv=quantize(layer.qkv.T),
                qkv_bias=layer.qkv_bias,
                projection=layer.projection,
                norm_2=layer.norm_2,
                expand=quantize(layer.expand.T),
                expand_bias=layer.expand_bias,
                contract=quantize(layer.contract.T),
            )
            for layer in self.layers
        ]
        if release:
            self.layers = []
            for block in model.base_model.h:
                for module in (block.attn.c_attn, block.mlp.c_fc, block.mlp.c_proj):
                    module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)

    def _run(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        assert isinstance(self._workspace, _Fp8Workspace)
        stream, normed, qkv, inside = self._workspace.views(ids.numel())
        narrow, wide = (rows.rows(ids.numel()) for rows in self._workspace.quantized)
        self._embed(ids, stream)
        added: Tensor | None = None
        for layer in self.fp8_layers:
            _norm_quantized(layer.norm_1, stream, added, narrow)
            product(narrow, layer.qkv, layer.qkv_bias, qkv)
            mixed = self._attention(qkv.view(batch, length, 3, self.heads, -1))
            stream.addmm_(mixed, layer.projection)
            _norm_quantized(layer.norm_2, stream, None, narrow)
            product(narrow, layer.expand, layer.expand_bias, inside)
            _gelu_quantized(inside, wide)
            # Only the next norm adds the MLP's output to the stream; `normed` is free till then
            product(wide, layer.contract, None, normed)
            added = normed
        if added is not None:
            stream.add_(added)
        self.norm(stream, normed)
        return normed.view(batch, length, self.width)


def _norm_quantized(norm: Norm, stream: Tensor, added: Tensor | None, out: Quantized) -> None:
    """``stream += added``; then its layer norm, quantized, into ``out``."""
    if stream.device.type == "cuda":
        from trainer.models.gpt2 import fp8_kernel

        fp8_kernel.norm(
            stream, added, norm.missing, norm.weight, norm.bias, norm.eps, out.values, out.scales
        )
        return
    if added is not None:
        stream.add_(added)
    wide = stream.float() + norm.missing
    out.fill(F.layer_norm(wide, wide.shape[1:], norm.weight.float(), norm.bias.float(), norm.eps))


def _gelu_quantized(inside: Tensor, out: Quantized) -> None:
    """GELU by its tanh approximation, quantized, into ``out``."""
    if inside.device.type == "cuda":
        from trainer.models.gpt2 import fp8_kernel

        fp8_kernel.gelu(inside, out.values, out.scales)
        return
    out.fill(F.gelu(inside.float(), approximate="tanh"))


def _check_widths(body: Any) -> None:
    """Refuse a GPT-2 whose products fp8 units cannot take.

    Raises:
        ModelError: a width that `_ALIGNMENT` does not divide.
    """
    widths = {size for parameter in body.h.parameters() for size in parameter.shape}
    odd = sorted(width for width in widths if width % _ALIGNMENT)
    if odd:
        raise ModelError(
            f"fp8 products need widths that {_ALIGNMENT} divides, not {odd[0]}; use"
            " --teacher_precision=bf16"
        )
