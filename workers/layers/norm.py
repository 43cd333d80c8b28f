"""RMSNorm (Zhang and Sennrich 2019), computed in float32 whatever the dtype; knows no model.

Plain torch operations, each of which gives a row the same bits whatever rows stand beside it (tests compare them).
"""

from __future__ import annotations

import torch
from torch import nn

from workers.layers.parameter import Shard, ShardedParameter
from workers.native import NativeKernels


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, after adding a residual if there is one."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = ShardedParameter((size,), {"": Shard((size,), size=size)}, dtype, device)
        self._eps = eps
        self._native: NativeKernels | None = None

    def finish_loading(self, native: NativeKernels | None = None) -> None:
        """Take the native kernel where it is given and applies."""
        self._native = native if self.weight.dtype is torch.bfloat16 else None

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise x + residual, of any shape (..., size); returns that, and the sum as the next residual.

        May leave the sum in x.
        """
        if self._native is not None and x.dim() == 2:
            return self._native.add_rms_norm(x, residual, self.weight, self._eps)
        if residual is not None:
            x = x + residual
        return rms_norm(x, self.weight, self._eps), x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., size) normalised in float32, rounded to its dtype and multiplied by weight (broadcast to x)."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return (wide * scale).to(x.dtype) * weight
