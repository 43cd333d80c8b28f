"""What a communicator is, the group of one, and how a dimension is split; knows no way to reach another rank."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

from configs.errors import ConfigError, WorkerError

# Seconds that a rank waits for another inside a collective. Generous: ranks enter a step together, but the first
# one may compile or page weights in.
DEFAULT_DEADLINE = 60.0
# Seconds that ranks wait for each other when they leave.
CLOSE_DEADLINE = 5.0


def divide(total: int, parts: int, what: str) -> int:
    """The share of one of `parts` ranks in `total` of `what`; the only way to split a dimension.

    Raises:
        ConfigError: `total` is not divisible by `parts`.
    """
    if total % parts:
        raise ConfigError(
            f"{what} ({total}) cannot be split over {parts} ranks: {total % parts} would be left; "
            "choose a tensor_parallel_size that divides it",
            "tensor_parallel_size",
        )
    return total // parts


def divide_kv_heads(num_kv_heads: int, rank: int, world_size: int) -> tuple[int, int]:
    """First K/V head of a rank and how many it holds; heads fewer than ranks are replicated on neighbours.

    Raises:
        ConfigError: neither divides the other.
    """
    if num_kv_heads >= world_size:
        count = divide(num_kv_heads, world_size, "num_key_value_heads")
        return rank * count, count
    if world_size % num_kv_heads:
        raise ConfigError(
            f"num_key_value_heads ({num_kv_heads}) can neither be split nor replicated over {world_size} ranks; "
            f"choose a tensor_parallel_size that divides it or is a multiple of it",
            "tensor_parallel_size",
        )
    return rank // (world_size // num_kv_heads), 1


def sum_in_rank_order(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """((part 0 + part 1) + part 2) …, 16-bit floats added in float32 and rounded once. A new tensor."""
    dtype = parts[0].dtype
    narrow = dtype in (torch.bfloat16, torch.float16)
    wide = [part.float() for part in parts] if narrow else parts
    total = wide[0].clone() if len(wide) == 1 else torch.add(wide[0], wide[1])
    for part in wide[2:]:
        total.add_(part)
    return total.to(dtype)


class StepGivenUp(WorkerError):
    """Another rank of the group has given up the step that this one computes (see `Communicator.give_up`)."""


class Communicator(abc.ABC):
    """Collectives of one tensor-parallel group, seen from one rank.

    Every rank makes the same calls in the same order with tensors of the same shape and dtype. A call may overwrite
    the tensor it is given. A wait that comes to its deadline raises WorkerError, whose `rank` was waited for.

    Attributes:
        capturable: whether a CUDA graph may hold the collectives.
    """

    rank: int
    world_size: int
    capturable = False

    @abc.abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, the same bits on each. On CPU always added in rank order, whatever the batch."""

    @abc.abstractmethod
    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenate the ranks' tensors along `dim`, in rank order."""

    @abc.abstractmethod
    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """Like `all_gather`, but only rank 0 gets the result; the others get None."""

    @abc.abstractmethod
    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The tensor of rank `source`, on every rank; the others' contents do not matter."""

    @abc.abstractmethod
    def barrier(self) -> None:
        """Return once every rank has called it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the group together: a barrier with a deadline, then what was shared is released. Harmless twice."""

    def abort(self) -> None:  # noqa: B027  (optional: by default the others find out at their deadline)
        """Tell the other ranks that this one cannot go on, so that their waits fail now."""

    def give_up(self) -> bool:
        """Leave the step that is being computed, wherever it stands: the others' waits raise StepGivenUp.

        Each of them gives up as well, and each calls `begin_anew` before its next collective.

        Returns:
            False where the group cannot go on after that. Then nothing was done.
        """
        return False

    def begin_anew(self) -> None:  # noqa: B027  (a group that cannot give up never does)
        """Forget the collectives of all steps before; every rank does so, whether it gave up or not."""


class SingleCommunicator(Communicator):
    """A group of one: every collective is the identity."""

    capturable = True

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """See `Communicator`."""
        return tensor

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """See `Communicator`."""
        return tensor

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Communicator`."""
        return tensor

    def barrier(self) -> None:
        """See `Communicator`."""

    def close(self) -> None:
        """See `Communicator`."""

    def give_up(self) -> bool:
        """See `Communicator`."""
        return True
