"""The student: a pre-norm, causal transformer language model in the GPT-2 family.

With learned positions this is GPT-2's architecture (Radford et al., 2019) with exact GELU, an
untied output head and no bias on it; with rotary positions (Su et al., 2021, arXiv:2104.09864)
queries and keys are rotated instead. Parameter names and order are part of the checkpoint format.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.uninitialized import Uninitialized

ROPE_BASE = 10_000.0


@dataclass(frozen=True)
class StudentConfig:
    """The hyperparameters that a student's shapes and its function depend on."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    positions: int
    """Rows of the learned position table; 0 with rotary positions."""
    pos_embedding: str = "absolute"
    rope_scale: float = 1.0
    dropout: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As JSON types, for checkpoint metadata."""
        return asdict(self)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, parameters named as in `torch.nn.MultiheadAttention`."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width = config.d_model
        self.n_heads = config.n_heads
        self.dropout = config.dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """``[B, L, D]`` to ``[B, L, D]``; ``rotation`` holds cosines and sines ``[L, D/H/2]``."""
        batch, length, width = x.shape
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = (
            part.view(batch, length, self.n_heads, width // self.n_heads).transpose(1, 2)
            for part in projected.split(width, dim=-1)
        )
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        width = config.d_model
        self.ln1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.ln2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """``[B, L, D]`` to ``[B, L, D]``."""
        x = x + self.drop(self.attn(self.ln1(x), rotation))
        return x + self.drop(self.mlp(self.ln2(x)))


class Student(nn.Module):
    """Token ids to the last hidden state; `lm_head` turns that into logits.

    They are separate because the loss takes hidden state and head: see `trainer.loss.chunked`.
    Weights are arbitrary, and need not be finite, until `initialize` or a state dict sets them.
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        """Recompute each block in the backward pass (Chen et al., 2016, arXiv:1604.06174)."""
        with Uninitialized():
            self.embed = nn.Embedding(config.vocab_size, config.d_model)
            if config.pos_embedding == "absolute":
                self.pos: nn.Embedding | None = nn.Embedding(config.positions, config.d_model)
            else:
                self.pos = None
            self.drop = nn.Dropout(config.dropout)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
            self.ln_f = nn.LayerNorm(config.d_model)
            self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> Student:
        """GPT-2's initialization: normal with deviation 0.02, residual outputs scaled down."""
        generator = torch.Generator().manual_seed(seed)
        residual = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                last = name.endswith(("attn.out_proj.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=residual if last else 0.02, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
        return self

    def forward(self, ids: Tensor, position_table: Tensor | None = None) -> Tensor:
        """``[B, L]`` token ids to the normalized hidden state ``[B, L, D]``.

        Args:
            ids: token ids.
            position_table: ``[≥ L, D]``, used in place of the learned table, so that evaluation
                can go past the trained positions without changing the weights.
        """
        length = ids.shape[1]
        x = self.embed(ids)
        rotation = None
        if self.pos is None:
            head_width = self.config.d_model // self.config.n_heads
            rotation = rotary_tables(length, head_width, self.config.rope_scale, x.device)
        else:
            table = self.pos.weight if position_table is None else position_table
            x = x + table[:length].to(x.dtype)
        if _autocast_type(x) == torch.bfloat16:
            # Halves the residual stream's traffic and memory; the range of fp16 is too small for it
            x = x.to(torch.bfloat16)
        x = self.drop(x)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, rotation, use_reentrant=False)
            else:
                x = block(x, rotation)
        x = self.ln_f(x)
        # Compiled, this cast is fused into the norm; outside, it would cost an fp32 copy
        return x.to(_autocast_type(x) or x.dtype)

    def logits(self, ids: Tensor) -> Tensor:
        """``[B, L]`` token ids to ``[B, L, V]`` logits, for tests and short texts."""
        return self.lm_head(self.forward(ids))


def _autocast_type(x: Tensor) -> torch.dtype | None:
    """The type in which autocast computes products now; None outside autocast."""
    if not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def rotary_tables(
    length: int, head_width: int, scale: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[length, head_width / 2]`` in fp32.

    ``scale`` divides the positions (position interpolation, Chen et al., 2023, arXiv:2306.15595).
    """
    exponent = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    positions = torch.arange(length, device=device, dtype=torch.float32)
    # In the order of `transformers`: far from the start, another rounding of a frequency is seen
    frequencies = 1.0 / ROPE_BASE**exponent / scale
    angles = positions[:, None] * frequencies[None, :]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate ``[B, H, L, W]`` by position: entry i of the first half of W with i of the second."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
    return rotated.to(x.dtype)


def expected_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter in module order, without allocating any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Student(config).named_parameters()}
