"""Parameters that know which part of which checkpoint tensor is theirs; knows neither files nor layers."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import nn

_ROWS_COMPARED = 4096


class TensorSource(Protocol):
    """A tensor of the checkpoint that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    def read(self, dim: int, start: int, size: int) -> torch.Tensor:
        """Read `size` indices from `start` along `dim`, and nothing else of it, on CPU in the file's dtype."""


class WeightStore(Protocol):
    """What keeps a parameter's numbers in a form of its own, on CPU."""

    def put(self, part: torch.Tensor, start: int) -> None:
        """Take rows of the parameter from row `start` on, all columns of them, in any floating dtype."""

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows `ids` as they were put, in the parameter's dtype."""


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
    its part. What no shard covers, at the end, is zero.

    With a `store` it has no memory: what it loads goes from the file straight into the form that is computed with.
    """

    shards: dict[str, Shard]
    store: WeightStore | None

    def __new__(
        cls,
        shape: tuple[int, ...],
        shards: dict[str, Shard],
        dtype: torch.dtype,
        device: torch.device,
        store: WeightStore | None = None,
    ) -> ShardedParameter:
        covered = sum(shard.size for shard in shards.values())
        dim = next(iter(shards.values())).dim
        make = torch.empty if covered == shape[dim] else torch.zeros
        place = device if store is None else torch.device("meta")
        parameter: ShardedParameter = super().__new__(cls, make(shape, dtype=dtype, device=place), False)
        parameter.shards, parameter.store = shards, store
        if store is not None and covered < shape[dim]:
            assert dim == 0, "a store takes whole rows"
            store.put(torch.zeros(shape[0] - covered, *shape[1:], dtype=dtype), covered)
        return parameter

    def load(self, name: str, source: TensorSource) -> None:
        """Copy this rank's part of the tensor called `name` in, converting as it goes."""
        shard = self.shards[name]
        assert source.shape == shard.shape, f"{source.shape} where {shard.shape} was checked for"
        if shard.size == 0:
            return
        part = source.read(shard.dim, shard.start, shard.size)
        if self.store is not None:
            assert shard.dim == 0 or shard.target == 0, "a store takes whole rows"
            self.store.put(part, shard.target if shard.dim == 0 else 0)
        else:
            self.data.narrow(shard.dim, shard.target, shard.size).copy_(part)

    def holds(self, name: str, source: TensorSource) -> bool:
        """Whether this rank's part of a tensor equals what was loaded under `name`."""
        shard = self.shards[name]
        part = source.read(shard.dim, shard.start, shard.size)
        if self.store is None:
            own = self.data.narrow(shard.dim, shard.target, shard.size)
            return torch.equal(part.to(self.device, self.dtype), own)
        assert shard.dim == 0, "a store takes whole rows"
        ids = torch.arange(shard.target, shard.target + shard.size)
        return all(
            torch.equal(some.to(self.dtype), self.store.rows(some_ids))
            for some, some_ids in zip(torch.split(part, _ROWS_COMPARED), torch.split(ids, _ROWS_COMPARED), strict=True)
        )
