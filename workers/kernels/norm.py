"""Residual and RMSNorm in one pass over a row; the twin is `workers.layers.norm.RMSNorm`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels import next_power_of_2


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, total, eps, x_stride, residual_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < SIZE
    values = tl.load(x + row * x_stride + at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        before = tl.load(residual + row * residual_stride + at, mask=inside, other=0.0)
        values = (values.to(tl.float32) + before.to(tl.float32)).to(values.dtype)
        tl.store(total + row * SIZE + at, values, mask=inside)
    wide = values.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / SIZE + eps)
    factor = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    normalised = (wide * scale).to(values.dtype).to(tl.float32) * factor
    tl.store(out + row * SIZE + at, normalised.to(values.dtype), mask=inside)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise x + residual, row by row.

    Args:
        x: (num_rows, size), rows contiguous.
        residual: like `x`, or None for 0.
        weight: (size,), dtype of `x`.

    Returns:
        The normalised rows and the sum, both new (but without a residual the sum is `x`), like `x`.
    """
    num_rows, size = x.shape
    assert x.stride(1) == 1, "rows must be contiguous"
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x if residual is None else torch.empty_like(out)
    before = x if residual is None else residual
    if num_rows:
        block = next_power_of_2(size)
        _add_rms_norm[(num_rows,)](
            x, before, weight, out, total, eps, x.stride(0), before.stride(0),
            SIZE=size, BLOCK=block, HAS_RESIDUAL=residual is not None, num_warps=min(16, max(1, block // 512)),
        )  # fmt: skip
    return out, total
