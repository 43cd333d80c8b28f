"""SwiGLU in one pass; the twin is `workers.layers.activation.silu_and_mul`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


@triton.jit
def _silu_and_mul(gate_up, out, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up + row * stride + at, mask=inside, other=0.0)
    up = tl.load(gate_up + row * stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * SIZE + at, (silu * up).to(gate.dtype), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of (num_tokens, 2 * size), gate and up side by side; (num_tokens, size) of the same dtype."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1, "rows must be contiguous"
    out = gate_up.new_empty(num_tokens, size)
    if num_tokens:
        grid = (num_tokens, triton.cdiv(size, _BLOCK))
        _silu_and_mul[grid](gate_up, out, gate_up.stride(0), SIZE=size, BLOCK=_BLOCK)
    return out
