"""How ranks work together: splitting dimensions and the collectives between ranks; knows no model.

The communicator is an object handed to the layers, never a module global, so that ranks can also be threads.
"""

from __future__ import annotations

import abc

import torch

from configs.errors import ConfigError


def divide(total: int, parts: int, what: str) -> int:
    """The share of one of `parts` ranks in `total` of `what`; the only way to split a dimension.

    Raises:
        ConfigError: `total` is not divisible by `parts`.
    """
    if total % parts:
        raise ConfigError(
            f"{what} ({total}) cannot be split over {parts} ranks; choose a tensor_parallel_size that divides it"
        )
    return total // parts


class Communicator(abc.ABC):
    """Collectives of one tensor-parallel group, seen from one rank. Every rank calls them in the same order."""

    rank: int
    world_size: int

    @abc.abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, always added in rank order so that each rank gets the same bits whatever the batch."""

    @abc.abstractmethod
    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors (of one shape) along `dim`, in rank order."""

    @abc.abstractmethod
    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """Like `all_gather`, but only rank 0 gets the result; the others get None."""

    @abc.abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The tensor of rank `source`, on every rank; shape and dtype agree beforehand."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the group together: a barrier with a deadline, then whatever was shared is released."""
