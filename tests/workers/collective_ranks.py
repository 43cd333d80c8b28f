"""What each rank's process does in tests of the communicators; importable, since spawned processes find it by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from configs.errors import WorkerError
from workers.parallel import Communicator, SharedMemoryCommunicator, TorchCommunicator

Task = Callable[[Communicator], Any]


def shared_memory_rank(rank: int, world_size: int, path: Path, task: Task, results: Any) -> None:
    """One process of a group over a file; small slots, so that tensors take many exchanges."""
    torch.set_num_threads(1)
    fd = os.open(path, os.O_RDWR)
    communicator = SharedMemoryCommunicator(rank, world_size, fd, deadline=3.0, slot_bytes=4096)
    os.close(fd)  # the mapping stays
    results.put((rank, task(communicator)))
    communicator.close()


def gloo_rank(rank: int, world_size: int, path: Path, task: Task, results: Any) -> None:
    """One process of a gloo group."""
    torch.set_num_threads(1)
    communicator = TorchCommunicator(rank, world_size, path, torch.device("cpu"), deadline=20)
    results.put((rank, task(communicator)))
    communicator.close()
    communicator.close()


def part_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A rank's summand; magnitudes differ, so that the order of adding shows."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(shape, generator=generator) * 10.0**rank).to(dtype)


def every_collective(communicator: Communicator) -> dict[str, Any]:
    """All operations over sizes of one slot, many slots and odd ends; plain bytes, to be compared exactly."""
    rank, found = communicator.rank, {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((1, 8), (3, 1000), (7, 3001)):
            summed = communicator.all_reduce(part_of(rank, shape, dtype))
            found[f"sum {dtype} {shape}"] = summed.float().numpy().tobytes()
    mine = part_of(rank, (5, 900), torch.float32)
    found["all_gather"] = communicator.all_gather(mine).numpy().tobytes()
    found["all_gather 0"] = communicator.all_gather(mine, dim=0).numpy().tobytes()
    gathered = communicator.gather(mine)
    found["gather"] = None if gathered is None else gathered.numpy().tobytes()
    for source in range(communicator.world_size):
        ids = torch.arange(source, source + 9) if rank == source else torch.zeros(9, dtype=torch.int64)
        found[f"broadcast {source}"] = communicator.broadcast(ids, source).tolist()
    communicator.barrier()
    return found


def many_sums(communicator: Communicator) -> int:
    """How many of 300 back-to-back sums, with broadcasts and gathers between, came out wrong."""
    wrong, world_size = 0, communicator.world_size
    for i in range(300):
        total = communicator.all_reduce(torch.full((1 + i % 40,), float(communicator.rank + i)))
        wrong += bool((total != world_size * i + world_size * (world_size - 1) // 2).any())
        if i % 7 == 0:
            communicator.gather(torch.ones(3))
        if i % 5 == 0:
            source = i % world_size
            wrong += (
                communicator.broadcast(torch.tensor([i if communicator.rank == source else -1]), source).item() != i
            )
    return wrong


def all_then_the_last_rank_dies(communicator: Communicator) -> tuple[dict[str, Any], int, object]:
    """Everything above; then the last rank dies: whom do the others name?"""
    found, wrong = every_collective(communicator), many_sums(communicator)
    if communicator.rank == communicator.world_size - 1:
        os._exit(3)
    try:
        communicator.all_reduce(torch.ones(4))
    except WorkerError as error:
        return found, wrong, error.rank
    return found, wrong, "no error"
