"""Rotary position embedding (Su et al. 2021) with linear and llama3 scaling, in float32; knows no model.

Halves are rotated against each other (not neighbours), as Hugging Face checkpoints expect.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from configs.checkpoint import RopeConfig


class RotaryEmbedding(nn.Module):
    """A table of cosines and sines for every position that can occur.

    Args:
        head_dim: size of a head, even.
        num_positions: positions from 0 that the table holds.
        rope: base and scaling.
    """

    def __init__(self, head_dim: int, num_positions: int, rope: RopeConfig, device: torch.device) -> None:
        super().__init__()
        positions = torch.arange(num_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(head_dim, rope))  # (num_positions, head_dim / 2)
        table = torch.stack((angles.cos(), angles.sin()), dim=1)  # (num_positions, 2, head_dim / 2)
        self.table: torch.Tensor
        self.register_buffer("table", table.to(device), persistent=False)

    def forward(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of (num_tokens,) int64 positions, each (num_tokens, 1, head_dim / 2) float32."""
        cos, sin = self.table.index_select(0, positions).unbind(1)
        return cos[:, None], sin[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate heads (num_tokens, num_heads, head_dim) by the angles of their tokens; computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def inverse_frequencies(head_dim: int, rope: RopeConfig) -> torch.Tensor:
    """Angle per position of each pair, (head_dim / 2,) float32.

    llama3 leaves short wavelengths, divides long ones by `factor`, and blends in between (Llama 3.1 model card).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies: torch.Tensor = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        original = rope.original_max_position_embeddings
        blend = (original / wavelengths - low) / (high - low)
        blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
        scaled = torch.where(wavelengths > original / low, frequencies / rope.factor, blended)
        return torch.where(wavelengths < original / high, frequencies, scaled)
    assert rope.rope_type == "default", f"rope type {rope.rope_type} should have been refused with the config"
    return frequencies
