"""A fast body for a frozen GPT-2: token ids to the last hidden state, for inference alone.

The same function as the body of a stock `transformers` GPT-2 (Radford et al., 2019), with less
memory traffic between its matrix products:

- GELU runs in the epilogue of the product before it;
- the products that add to the residual stream accumulate in it, so no kernel of their own does.
  Their biases are left out of the stream; the sum of these so far is a constant vector, which
  each layer norm adds in fp32;
- layer norm is one Triton kernel that reads the stream once;
- attention reads query, key and value where their product wrote them;
- a CUDA graph replays the whole body, with no gaps between kernels.

The weights are the stock model's own, not copies. Without a GPU or Triton the same algebra runs
as plain torch operations.
"""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.runtime.errors import ModelError

MAX_GRAPHS = 4
"""Shapes of ids that are replayed from a CUDA graph; others run kernel by kernel."""

_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""In order of preference; torch passes over a backend that cannot take a shape."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(model: Any) -> bool:
    """Whether `GPT2Body` computes what this model's body computes.

    True of a `transformers` GPT2LMHeadModel or GPT2Model with tanh-approximated GELU, scaled
    attention and no cross-attention, its weights in one floating type on one device.
    """
    from transformers import GPT2LMHeadModel, GPT2Model

    if type(model) not in (GPT2LMHeadModel, GPT2Model):
        return False
    config = model.config
    places = {(parameter.device, parameter.dtype) for parameter in model.parameters()}
    return (
        config.activation_function in ("gelu_new", "gelu_pytorch_tanh")
        and config.scale_attn_weights
        and not config.scale_attn_by_inverse_layer_idx
        and not config.reorder_and_upcast_attn
        and not config.add_cross_attention
        and len(places) == 1
        and next(iter(places))[1] in _DTYPES
    )


@dataclass(frozen=True)
class Norm:
    """A layer norm of the residual stream and of the biases that the stream leaves out."""

    weight: Tensor
    bias: Tensor
    eps: float
    missing: Tensor
    """``[D]`` in fp32: the sum of all biases left out so far."""

    def __call__(self, stream: Tensor, out: Tensor) -> None:
        """Normalize ``stream + missing`` ``[N, D]`` into ``out``."""
        if stream.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from trainer.models.gpt2 import layer_norm_kernel

            layer_norm_kernel.launch(stream, self.missing, self.weight, self.bias, self.eps, out)
            return
        wide = torch.promote_types(stream.dtype, torch.float32)
        shape = (stream.shape[1],)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        out.copy_(F.layer_norm(stream.to(wide) + self.missing, shape, weight, bias, self.eps))


Matrix = TypeVar("Matrix")


@dataclass(frozen=True)
class Layer(Generic[Matrix]):
    """One block's weights; tensors are ``[in, out]``, as `transformers` stores them."""

    norm_1: Norm
    qkv: Matrix
    qkv_bias: Tensor
    projection: Tensor
    norm_2: Norm
    expand: Matrix
    expand_bias: Tensor
    contract: Matrix


class Workspace:
    """Activations of up to ``tokens`` tokens."""

    def __init__(self, tokens: int, width: int, inner: int, like: Tensor) -> None:
        self.tokens = tokens
        self.width, self.inner = width, inner
        self.stream = like.new_empty(tokens * width)
        self.normed = like.new_empty(tokens * width)
        # Either query, key and value or the inside of the MLP: never both at a time
        self.wide = like.new_empty(tokens * max(3 * width, inner))

    def views(self, tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stream, normed, qkv and MLP activations of ``tokens`` tokens, two-dimensional."""
        return (
            self.stream[: tokens * self.width].view(tokens, self.width),
            self.normed[: tokens * self.width].view(tokens, self.width),
            self.wide[: tokens * 3 * self.width].view(tokens, 3 * self.width),
            self.wide[: tokens * self.inner].view(tokens, self.inner),
        )


@dataclass(frozen=True)
class _Graph:
    """A captured run over ids of one shape."""

    graph: torch.cuda.CUDAGraph
    ids: Tensor
    out: Tensor


class GPT2Body:
    """The body of a stock GPT-2, frozen; call it with ids ``[B, L]``.

    Args:
        model: a model that `supports` accepts, already in its final type and place. Its weights
            are used, not copied: keep them unchanged.

    Raises:
        ModelError: the model is not supported.
    """

    workspace_type = Workspace

    def __init__(self, model: Any) -> None:
        if not supports(model):
            raise ModelError(
                f"{type(model).__name__} is not a GPT-2 that the fast body computes; use its own"
            )
        body = model.base_model
        self.embed = body.wte.weight.detach()
        self.positions = body.wpe.weight.detach()
        self.heads = model.config.num_attention_heads
        self.width = self.embed.shape[1]
        self.layers: list[Layer[Tensor]] = []
        missing = torch.zeros(
            self.width,
            dtype=torch.promote_types(self.embed.dtype, torch.float32),
            device=self.embed.device,
        )
        for block in body.h:
            after_attention = missing + block.attn.c_proj.bias.detach()
            self.layers.append(_layer(block, missing, after_attention))
            missing = after_attention + block.mlp.c_proj.bias.detach()
        self.norm = _norm(body.ln_f, missing)
        self.inner = max((layer.expand.shape[1] for layer in self.layers), default=0)
        self._workspace: Workspace | None = None
        self._graphs: dict[tuple[int, ...], _Graph | None] = {}

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """``[B, L]`` token ids to the hidden state after the last layer norm, ``[B, L, D]``.

        A shape's second call captures a CUDA graph. The result is not in the workspace.

        Raises:
            ModelError: the ids are longer than the model's position table.
        """
        if ids.shape[1] > self.positions.shape[0]:
            raise ModelError(
                f"{ids.shape[1]} tokens are more than the {self.positions.shape[0]} positions of"
                " this GPT-2; shorten the context"
            )
        self._reserve(ids.numel())
        shape = tuple(ids.shape)
        captured = self._graphs.get(shape)
        if ids.device.type == "cuda" and captured is None and shape in self._graphs:
            captured = self._capture(ids)
        # A shape seen once, such as that of a smaller last batch, is not worth a capture
        self._graphs[shape] = captured
        if captured is None:
            return self._run(ids).clone()
        captured.ids.copy_(ids)
        captured.graph.replay()
        return captured.out.clone()

    def release(self) -> None:
        """Give up workspace and graphs; the next call makes new ones."""
        self._graphs.clear()
        self._workspace = None

    def _reserve(self, tokens: int) -> None:
        """Make the workspace large enough; graphs hold the addresses of the old one."""
        if self._workspace is None or self._workspace.tokens < tokens:
            self._graphs.clear()
            self._workspace = None
            self._workspace = self.workspace_type(tokens, self.width, self.inner, self.embed)

    def _capture(self, ids: Tensor) -> _Graph | None:
        graphs = sum(graph is not None for graph in self._graphs.values())
        if graphs >= MAX_GRAPHS or torch.cuda.is_current_stream_capturing():
            return None
        ids = ids.clone()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        # The default stream cannot be captured; any other is, as it has cuBLAS's workspace already
        stream = None if current == torch.cuda.default_stream() else current
        with torch.cuda.graph(graph, stream=stream):
            out = self._run(ids)
        return _Graph(graph, ids, out)

    def _run(self, ids: Tensor) -> Tensor:
        """The hidden state, in the workspace."""
        batch, length = ids.shape
        assert self._workspace is not None
        stream, normed, qkv, inside = self._workspace.views(ids.numel())
        self._embed(ids, stream)
        for layer in self.layers:
            layer.norm_1(stream, normed)
            torch.addmm(layer.qkv_bias, normed, layer.qkv, out=qkv)
            mixed = self._attention(qkv.view(batch, length, 3, self.heads, -1))
            stream.addmm_(mixed, layer.projection)
            layer.norm_2(stream, normed)
            _expand(layer, normed, inside)
            stream.addmm_(inside, layer.contract)
        self.norm(stream, normed)
        return normed.view(batch, length, self.width)

    def _embed(self, ids: Tensor, stream: Tensor) -> None:
        """Tokens and positions of ``[B, L]`` ids into the stream ``[B · L, D]``."""
        torch.index_select(self.embed, 0, ids.reshape(-1), out=stream)
        stream.view(*ids.shape, self.width).add_(self.positions[: ids.shape[1]])

    def _attention(self, qkv: Tensor) -> Tensor:
        """``[B, L, 3, H, W]`` to ``[B · L, H · W]``; no copy where the backend takes strides."""
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        with _attention_backends(qkv.device):
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.transpose(1, 2).reshape(-1, self.width)


def _attention_backends(device: torch.device) -> contextlib.AbstractContextManager[None]:
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel(_BACKENDS, set_priority=True)


def _expand(layer: Layer[Tensor], normed: Tensor, out: Tensor) -> None:
    """``gelu(normed · expand + bias)`` into ``out``."""
    if out.device.type == "cuda":
        torch._addmm_activation(layer.expand_bias, normed, layer.expand, use_gelu=True, out=out)
        return
    out.copy_(F.gelu(torch.addmm(layer.expand_bias, normed, layer.expand), approximate="tanh"))


def _norm(norm: torch.nn.LayerNorm, missing: Tensor) -> Norm:
    return Norm(norm.weight.detach(), norm.bias.detach(), norm.eps, missing)


def _layer(block: Any, missing: Tensor, after_attention: Tensor) -> Layer[Tensor]:
    return Layer(
        norm_1=_norm(block.ln_1, missing),
        qkv=block.attn.c_attn.weight.detach(),
        qkv_bias=block.attn.c_attn.bias.detach(),
        projection=block.attn.c_proj.weight.detach(),
        norm_2=_norm(block.ln_2, after_attention),
        expand=block.mlp.c_fc.weight.detach(),
        expand_bias=block.mlp.c_fc.bias.detach(),
        contract=block.mlp.c_proj.weight.detach(),
    )
