"""Ranks as threads of one process, for tests and debugging; knows no process and no network."""

from __future__ import annotations

import contextlib
import threading

import torch

from configs.errors import WorkerError
from workers.parallel.base import CLOSE_DEADLINE, DEFAULT_DEADLINE, Communicator, StepGivenUp, sum_in_rank_order


class _ThreadGroup:
    """What the ranks of one ThreadCommunicator group share."""

    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.slots: list[list[torch.Tensor | None]] = [[None] * world_size for _ in range(2)]
        self.arrived = [0] * world_size
        self.failed: int | None = None
        self.gave_up: int | None = None


class ThreadCommunicator(Communicator):
    """Ranks as threads of one process, for tests and debugging. Make them with `group`."""

    def __init__(self, rank: int, world_size: int, group: _ThreadGroup, deadline: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._group, self._deadline, self._closed = group, deadline, False

    @classmethod
    def group(cls, world_size: int, deadline: float = DEFAULT_DEADLINE) -> list[ThreadCommunicator]:
        """The communicators of a new group, in rank order."""
        shared = _ThreadGroup(world_size)
        return [cls(rank, world_size, shared, deadline) for rank in range(world_size)]

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        return sum_in_rank_order(self._exchange(tensor))

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """See `Communicator`."""
        return torch.cat(self._exchange(tensor), dim)

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """See `Communicator`."""
        parts = self._exchange(tensor)
        return torch.cat(parts, dim) if self.rank == 0 else None

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Communicator`."""
        return self._exchange(tensor)[source].clone()

    def barrier(self) -> None:
        """See `Communicator`."""
        self._wait(self._deadline)

    def close(self) -> None:
        """See `Communicator`."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(WorkerError):
                self._wait(min(self._deadline, CLOSE_DEADLINE))

    def abort(self) -> None:
        """See `Communicator`."""
        self._closed, self._group.failed = True, self.rank
        self._group.barrier.abort()

    def give_up(self) -> bool:
        """See `Communicator`."""
        self._group.gave_up = self.rank
        self._group.barrier.abort()
        return True

    def begin_anew(self) -> None:
        """See `Communicator`. No rank may be inside a collective, or come to one, until all have called it."""
        group = self._group
        group.arrived[self.rank] = 0
        group.gave_up = None
        if group.failed is None:
            group.barrier.reset()

    def _exchange(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        # Two sets of slots: a rank fills a set again only after the next barrier, when all have read it. A copy,
        # because the caller may change its tensor while others still read it.
        slots = self._group.slots[self._group.arrived[self.rank] % 2]
        slots[self.rank] = tensor.detach().clone()
        self._wait(self._deadline)
        return [slot for slot in slots if slot is not None]

    def _wait(self, deadline: float) -> None:
        group = self._group
        group.arrived[self.rank] += 1
        mine = group.arrived[self.rank]
        try:
            group.barrier.wait(deadline)
        except threading.BrokenBarrierError:
            if group.failed is None and group.gave_up is not None:
                raise StepGivenUp(f"rank {group.gave_up} has given up the step", group.gave_up) from None
            late = [rank for rank, count in enumerate(group.arrived) if count < mine]
            culprit = group.failed if group.failed is not None else late[0] if late else None
            raise WorkerError(f"rank {self.rank} waited in vain for rank {culprit} in a collective", culprit) from None
