"""Layer norm (Ba et al., 2016, arXiv:1607.06450) of rows plus a constant vector, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _layer_norm(  # type: ignore[no-untyped-def]
    rows,  # [N, D]
    shift,  # [D] in fp32
    weight,  # [D]
    bias,  # [D]
    out,  # [N, D]
    width,
    eps,
    BLOCK: tl.constexpr,  # the least power of two that is at least D
):
    start = tl.program_id(0).to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(rows + start + cols, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(shift + cols, mask=inside, other=0.0)
    mean = tl.sum(x, 0) / width
    centered = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centered * centered, 0) / width
    scale = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    y = centered * tl.rsqrt(variance + eps) * scale + offset
    tl.store(out + start + cols, y.to(out.dtype.element_ty), mask=inside)


def launch(
    rows: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> None:
    """``out = layer_norm(rows + shift)`` over the last dimension, computed in fp32.

    Shapes are those of the kernel's comments; matrices are contiguous.
    """
    count, width = rows.shape
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    _layer_norm[(count,)](rows, shift, weight, bias, out, width, eps, BLOCK=block, num_warps=warps)
