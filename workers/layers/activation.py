"""SwiGLU (Shazeer 2020), computed in float32; knows no model."""

from __future__ import annotations

import torch


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of (num_tokens, 2 * size), gate and up side by side; (num_tokens, size) of the same dtype.

    `F.silu` and `torch.sigmoid` are not used on CPU: they take the last few elements of an array, and of each thread's
    share of one, through other code than the rest, with other bits (measured in float32 at widths that are not a
    multiple of 32), so a token would depend on its place in the batch. `torch.exp` does not, and the other
    operations are rounded exactly.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    if gate.device.type != "cpu":
        return torch.nn.functional.silu(gate) * up
    wide = gate.float()  # float32 gives a view of the input, which must not be written to
    silu = wide / torch.exp(-wide).add_(1)
    return silu.to(gate.dtype).mul_(up)
