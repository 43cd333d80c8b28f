"""RMSNorm (Zhang and Sennrich 2019), computed in float32 whatever the dtype; knows no model.

Plain torch operations, each of which gives a row the same bits whatever rows stand beside it (tests compare them).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from workers.layers.parameter import Shard, ShardedParameter


class NormKernel(Protocol):
    """Computes what `add_rms_norm` does."""

    def __call__(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, /
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `add_rms_norm`."""


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight over the last dimension, after adding a residual if there is one."""

    def __init__(
        self, size: int, eps: float, dtype: torch.dtype, device: torch.device, kernel: NormKernel | None = None
    ) -> None:
        super().__init__()
        self._kernel = kernel or add_rms_norm
        self.weight = ShardedParameter((size,), {"": Shard((size,), size=size)}, dtype, device)
        self._eps = eps

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise x + residual, of any shape (..., size); returns that, and the sum as the next residual."""
        return self._kernel(x, residual, self.weight, self._eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + residual (0 when it is None), of any shape (..., size), normalised; and that sum."""
    if residual is not None:
        x = x + residual
    return rms_norm(x, weight, eps), x


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., size) normalised in float32, rounded to its dtype and multiplied by weight (broadcast to x)."""
    wide = x.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)  # (..., 1)
    return (wide * scale).to(x.dtype) * weight
