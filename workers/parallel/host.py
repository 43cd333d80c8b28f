"""Collectives of ranks that share a GPU: their tensors meet in the host's memory; knows neither a model nor NCCL."""

from __future__ import annotations

import torch

from workers.parallel.base import Communicator


class HostCommunicator(Communicator):
    """Copies tensors to the host, calls a communicator there, and copies the result back.

    NCCL refuses two ranks on one device. This is slow, and there to run a group on fewer GPUs than it has ranks.

    Args:
        on_host: what the ranks' processes share; its collectives take tensors on the CPU.
    """

    def __init__(self, on_host: Communicator) -> None:
        self.rank, self.world_size = on_host.rank, on_host.world_size
        self._on_host = on_host

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        return self._on_host.all_reduce(tensor.cpu()).to(tensor.device)

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """See `Communicator`."""
        return self._on_host.all_gather(tensor.cpu(), dim).to(tensor.device)

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """See `Communicator`."""
        gathered = self._on_host.gather(tensor.cpu(), dim)
        return None if gathered is None else gathered.to(tensor.device)

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Communicator`."""
        return self._on_host.broadcast(tensor.cpu(), source).to(tensor.device)

    def barrier(self) -> None:
        """See `Communicator`."""
        self._on_host.barrier()

    def give_up(self) -> bool:
        """See `Communicator`."""
        return self._on_host.give_up()

    def begin_anew(self) -> None:
        """See `Communicator`."""
        self._on_host.begin_anew()

    def close(self) -> None:
        """See `Communicator`."""
        self._on_host.close()

    def abort(self) -> None:
        """See `Communicator`."""
        self._on_host.abort()
