"""A GPT-2 body with most of its products in fp8: for a frozen teacher, faster and half the size.

Query, key and value and both products of the MLP multiply fp8 numbers (e4m3; Micikevicius et al.,
2022, arXiv:2209.05433), each token's activations and each output channel's weights with a scale of
their own, and accumulate in fp32. The attention's output product, attention itself, embeddings
and the residual stream stay in bf16. Between the products run two kernels that also quantize: the
layer norm, which adds the MLP's output to the stream on the way, and GELU.

That changes what the teacher says. `quantize_teacher` measures by how much, on the user's own
text, before anything is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.gpt2.body import GPT2Body, Norm, Workspace, supports
from trainer.runtime.errors import ModelError

FP8 = torch.float8_e4m3fn

LARGEST = torch.finfo(FP8).max

_ALIGNMENT = 16

_SMALLEST_ROW = 1e-12
"""Keeps the scale of a row of zeros from being zero."""


def has_fp8(device: torch.device) -> bool:
    """Whether the GPU multiplies fp8 numbers (compute capability 8.9 or above)."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


@dataclass(frozen=True)
class Quantized:
    """Rows in fp8, each with its scale."""

    values: Tensor
    """``[N, K]`` in fp8."""
    scales: Tensor
    """``[N, 1]`` in fp32: what the values are to be multiplied by."""

    @classmethod
    def empty(cls, rows: int, width: int, device: torch.device) -> Quantized:
        """Room for ``rows`` rows."""
        return cls(
            torch.empty(rows, width, dtype=FP8, device=device),
            torch.empty(rows, 1, dtype=torch.float32, device=device),
        )

    def rows(self, count: int) -> Quantized:
        """The first ``count`` rows."""
        return Quantized(self.values[:count], self.scales[:count])

    def fill(self, source: Tensor) -> Quantized:
        """Quantize ``[N, K]`` into these rows; each row's largest number becomes fp8's."""
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
    found = F.linear(left.values.float(), right.values.float()) * left.scales * right.scales.T
    out.copy_(found if bias is None else found + bias.float())


@dataclass(frozen=True)
class _Fp8Layer:
    """One block's weights; those in fp8 are ``[out, in]``."""

    norm_1: Norm
    qkv: Quantized
    qkv_bias: Tensor
    projection: Tensor
    norm_2: Norm
    expand: Quantized
    expand_bias: Tensor
    contract: Quantized


class GPT2Fp8Body(GPT2Body):
    """Like `GPT2Body`, with fp8 copies of most weights.

    Args:
        model: a model that `supports` accepts.
        release: drop the weights that were copied from the model, which cannot be used any more.

    Raises:
        ModelError: the model is not supported.
    """

    def __init__(self, model: Any, *, release: bool = False) -> None:
        super().__init__(model)
        self.fp8_layers = [
            _Fp8Layer(
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
        self._rows: tuple[Quantized, Quantized] | None = None

    def release(self) -> None:
        """Give up workspace, graphs and quantized rows; the next call makes its own."""
        super().release()
        self._rows = None

    def _reserve(self, tokens: int) -> None:
        before = self._workspace
        super()._reserve(tokens)
        if self._workspace is not before:
            self._rows = None
            device = self.embed.device
            self._rows = (
                Quantized.empty(tokens, self.width, device),
                Quantized.empty(tokens, self.inner, device),
            )

    def _run(self, ids: Tensor) -> Tensor:
        batch, length = ids.shape
        assert isinstance(self._workspace, Workspace)
        assert self._rows is not None
        stream, normed, qkv, inside = self._workspace.views(ids.numel())
        narrow, wide = (rows.rows(ids.numel()) for rows in self._rows)
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
            # What the MLP adds waits for the next norm, in the place of that norm's result
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
            stream,
            added,
            norm.missing,
            norm.weight,
            norm.bias,
            norm.eps,
            out.values,
            out.scales,
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


# ── what it costs in accuracy ─────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class QuantizationError:
    """How far the fp8 teacher is from the one it was made of, over some tokens."""

    divergence: float
    """KL(bf16 ‖ fp8) of the next token's distribution at temperature 1, in nats a token."""
    same_choice: float
    """Share of tokens whose most probable next token is the same."""
    hidden: float
    """‖fp8 − bf16‖ / ‖bf16‖ of the last hidden state."""


@torch.no_grad()
def quantize_teacher(
    model: Any, head: Tensor, windows: Tensor
) -> tuple[GPT2Fp8Body, QuantizationError]:
    """The fp8 body of a GPT-2 and its error on ``windows`` ``[B, T]`` of token ids.

    The model gives up the weights that are now in fp8.

    Args:
        model: a model that `supports` accepts, in its final place.
        head: ``[V, D]``, its output embedding.
        windows: token ids of real text, on the model's device.

    Raises:
        ModelError: there is no fp8 form of such a model.
    """
    _check_has_fp8_form(model)
    before = GPT2Body(model)(windows).flatten(0, 1)
    body = GPT2Fp8Body(model, release=True)
    after = body(windows).flatten(0, 1)
    wide_head = head.float()
    divergence = same = torch.zeros((), device=head.device, dtype=torch.float64)
    for left, right in zip(before.split(1024), after.split(1024), strict=True):
        # In fp32: rounding logits to bf16 would itself move them by as much
        exact, narrow = (F.linear(part.float(), wide_head) for part in (left, right))
        log_p, log_q = exact.log_softmax(1), narrow.log_softmax(1)
        divergence = divergence + (log_p.exp() * (log_p - log_q)).sum(1).double().sum()
        same = same + (exact.argmax(1) == narrow.argmax(1)).double().sum()
    difference = (after.float() - before.float()).norm() / before.float().norm()
    tokens = windows.numel()
    return body, QuantizationError(
        float(divergence) / tokens, float(same) / tokens, float(difference)
    )


def _check_has_fp8_form(model: Any) -> None:
    if not supports(model) or next(model.parameters()).dtype != torch.bfloat16:
        raise ModelError(
            f"{type(model).__name__} has no fp8 form, only GPT-2 in bf16 has; use"
            " --teacher_precision=bf16"
        )
    widths = {size for p in model.base_model.h.parameters() for size in p.shape}
    odd = sorted(width for width in widths if width % _ALIGNMENT)
    if odd:
        raise ModelError(
            f"fp8 products need widths that {_ALIGNMENT} divides, not {odd[0]}; use"
            " --teacher_precision=bf16"
        )
