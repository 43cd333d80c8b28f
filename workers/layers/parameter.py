"""Parameters that know which part of which checkpoint tensor is theirs; knows neither files nor layers."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import nn


class TensorSource(Protocol):
    """A tensor of the checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        """Read `size` indices from `start` along `dim`, and nothing else of it, on CPU in the file's dtype."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which part of one checkpoint tensor lands where in a rank's parameter.

    Attributes:
        shape: of the whole tensor in the checkpoint.
        dim: the dimension that is split; the others are whole.
        start: first index of this rank's part in the tensor.
        size: how many indices; 0 when the rank needs nothing of it.
        target: where the part begins in the parameter, along the same dimension.
    """

    shape: tuple[int, ...]
    dim: int = 0
    start: int = 0
    size: int = 0
    target: int = 0


class ShardedParameter(nn.Parameter):
    """A parameter that loads itself from the checkpoint tensors it is made of.

    `shards` maps the checkpoint's name of the layer (`q_proj` of a fused `qkv_proj`; "" when it is the layer's own) to
    its part. What no shard covers stays zero.
    """

    shards: dict[str, Shard]

    def __new__(
        cls, shape: tuple[int, ...], shards: dict[str, Shard], dtype: torch.dtype, device: torch.device
    ) -> ShardedParameter:
        covered = sum(shard.size for shard in shards.values())
        dim = next(iter(shards.values())).dim
        make = torch.empty if covered == shape[dim] else torch.zeros
        parameter: ShardedParameter = super().__new__(cls, make(shape, dtype=dtype, device=device), False)
        parameter.shards = shards
        return parameter

    def load(self, name: str, source: TensorSource) -> None:
        """Copy this rank's part of the tensor called `name` in, converting as it goes."""
        shard = self.shards[name]
        assert source.shape == shard.shape, f"{source.shape} where {shard.shape} was checked for"
        if shard.size:
            part = source.read(shard.dim, shard.start, shard.size)
            self.data.narrow(shard.dim, shard.target, shard.size).copy_(part)

    def holds(self, name: str, source: TensorSource) -> bool:
        """Whether this rank's part of a tensor equals what was loaded under `name`."""
        shard = self.shards[name]
        part = source.read(shard.dim, shard.start, shard.size).to(self.device, self.dtype)
        return torch.equal(part, self.data.narrow(shard.dim, shard.target, shard.size))
