"""Collectives of torch.distributed: NCCL between GPUs, gloo between CPU processes; knows no model."""

from __future__ import annotations

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from configs.errors import NanoEngineError, WorkerError
from workers.parallel.base import CLOSE_DEADLINE, DEFAULT_DEADLINE, Communicator, sum_in_rank_order

SELF_TEST_SECONDS = 60.0
_ADVICE = (
    "peer access between the GPUs may be broken (an IOMMU, a container without shared memory): try NCCL_P2P_DISABLE=1, "
    "look at `nvidia-smi topo -m`, and set NCCL_DEBUG=INFO to see more"
)


class TorchCommunicator(Communicator):
    """torch.distributed: NCCL between GPUs; gloo on CPU, which gathers and then adds in rank order.

    Gloo's own all-reduce adds in an order that depends on the number of rows. NCCL's is used as it is: on GPUs
    bit-identity is not promised.

    Args:
        rank: this process's.
        world_size: number of ranks.
        store_path: a file in the private run directory through which ranks find each other.
        device: where the tensors will be.
        deadline: seconds that a collective may take.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store_path: str | Path,
        device: torch.device,
        deadline: float = DEFAULT_DEADLINE,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._on_gpu = device.type == "cuda"
        # One host: never listen on an interface that others can reach.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        options: dict[str, Any] = {}
        if self._on_gpu:
            torch.cuda.set_device(device)
            options["device_id"] = device
        with self._named_errors():
            dist.init_process_group(
                "nccl" if self._on_gpu else "gloo",
                store=dist.FileStore(str(store_path), world_size),  # type: ignore[attr-defined]
                rank=rank,
                world_size=world_size,
                timeout=datetime.timedelta(seconds=deadline),
                **options,
            )
        self._closed = False
        # NCCL's collectives are launched on the device, where a graph can hold them.
        self.capturable = self._on_gpu
        self.self_test(device)

    def self_test(self, device: torch.device) -> None:
        """Add and gather known numbers, few and many: broken peer access shows as wrong sums, or as a hang.

        Raises:
            WorkerError: the ranks do not get each other's numbers, or not within `SELF_TEST_SECONDS`.
        """
        ranks = torch.arange(1, self.world_size + 1, dtype=torch.float32, device=device)
        for size in (1, 1 << 20):
            own = torch.full((size,), float(self.rank + 1), device=device)
            gathered, added = self.all_gather(own[None], dim=0), self.all_reduce(own)
            if self._on_gpu:
                self._await_device()
            if not (bool((added == ranks.sum()).all()) and bool((gathered == ranks[:, None]).all())):
                raise WorkerError(f"rank {self.rank} gets wrong numbers from the other ranks on {device}; {_ADVICE}")

    def _await_device(self) -> None:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        deadline = time.monotonic() + SELF_TEST_SECONDS
        while not done.query():  # type: ignore[no-untyped-call]
            if time.monotonic() > deadline:
                raise WorkerError(
                    f"rank {self.rank} waited {SELF_TEST_SECONDS:g} s for a first collective between GPUs; {_ADVICE}"
                )
            time.sleep(0.001)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Communicator`."""
        if not self._on_gpu:
            return sum_in_rank_order(self._gather_parts(tensor))
        tensor = tensor.contiguous()
        with self._named_errors():
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """See `Communicator`."""
        return torch.cat(self._gather_parts(tensor), dim)

    def gather(self, tensor: torch.Tensor, dim: int = -1) -> torch.Tensor | None:
        """See `Communicator`."""
        parts = self._gather_parts(tensor)
        return torch.cat(parts, dim) if self.rank == 0 else None

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> torch.Tensor:
        """See `Communicator`."""
        tensor = tensor.contiguous()
        with self._named_errors():
            dist.broadcast(tensor, source)
        return tensor

    def barrier(self) -> None:
        """See `Communicator`."""
        with self._named_errors():
            dist.barrier()

    def close(self) -> None:
        """See `Communicator`."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RuntimeError, NanoEngineError):
            if self._on_gpu:
                dist.barrier()
            else:
                dist.monitored_barrier(timeout=datetime.timedelta(seconds=CLOSE_DEADLINE))
        dist.destroy_process_group()

    def _gather_parts(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        tensor = tensor.contiguous()
        # As bytes, because gloo does not know every dtype.
        flat = tensor.view(-1).view(torch.uint8)
        parts = [torch.empty_like(flat) for _ in range(self.world_size)]
        with self._named_errors():
            dist.all_gather(parts, flat)
        return [part.view(tensor.dtype).view(tensor.shape) for part in parts]

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # DistError and its kin; torch does not say which rank was at fault
            raise WorkerError(f"a collective failed on rank {self.rank}: {error}") from error
