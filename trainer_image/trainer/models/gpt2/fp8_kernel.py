"""Triton kernels that quantize to fp8 on the way: layer norm with a residual sum, and GELU."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _store_quantized(x, inside, row, cols, out, scales, width):  # type: ignore[no-untyped-def]
    """Scale a row so that its largest number becomes 448, that of e4m3; store row and scale."""
    largest = tl.max(tl.where(inside, tl.abs(x), 0.0), 0)
    scale = tl.maximum(largest, 1e-12) / 448.0
    tl.store(scales + row, scale)
    y = (x / scale).to(out.dtype.element_ty)
    tl.store(out + row * width + cols, y, mask=inside)


@triton.jit
def _norm_quantized(  # type: ignore[no-untyped-def]
    stream,  # [N, D]; the sum replaces it unless added is None
    added,  # [N, D] or None
    shift,  # [D] in fp32
    weight,  # [D]
    bias,  # [D]
    out,  # [N, D] in fp8
    scales,  # [N] in fp32
    width,
    eps,
    BLOCK: tl.constexpr,  # the least power of two that is at least D
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    place = row * width + cols
    x = tl.load(stream + place, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        x += tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(stream.dtype.element_ty)
        tl.store(stream + place, rounded, mask=inside)
        x = rounded.to(tl.float32)
    x += tl.load(shift + cols, mask=inside, other=0.0)
    mean = tl.sum(tl.where(inside, x, 0.0), 0) / width
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, 0) / width
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    y = centered * tl.rsqrt(variance + eps) * scale + offset
    _store_quantized(y, inside, row, cols, out, scales, width)


@triton.jit
def _gelu_quantized(  # type: ignore[no-untyped-def]
    rows,  # [N, K]
    out,  # [N, K] in fp8
    scales,  # [N] in fp32
    width,
    BLOCK: tl.constexpr,  # the least power of two that is at least K
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(rows + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    # x · (1 + tanh(z)) / 2 = x · sigmoid(2 z)
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    _store_quantized(x * tl.sigmoid(2.0 * z), inside, row, cols, out, scales, width)


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def norm(
    stream: Tensor,
    added: Tensor | None,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out: Tensor,
    scales: Tensor,
) -> None:
    """``stream += added``, then ``layer_norm(stream + shift)`` in fp8, row by row.

    Shapes are those of the kernel's comments; matrices are contiguous. Result: ``out · scales``.
    """
    count, width = stream.shape
    block = triton.next_power_of_2(width)
    _norm_quantized[(count,)](
        stream,
        added,
        shift,
        weight,
        bias,
        out,
        scales,
        width,
        eps,
        BLOCK=block,
        num_warps=_warps(block),
    )


def gelu(rows: Tensor, out: Tensor, scales: Tensor) -> None:
    """GELU by its tanh approximation in fp8, row by row.

    Shapes are those of the kernel's comments; matrices are contiguous. Result: ``out · scales``.
    """
    count, width = rows.shape
    block = triton.next_power_of_2(width)
    _gelu_quantized[(count,)](rows, out, scales, width, BLOCK=block, num_warps=_warps(block))
