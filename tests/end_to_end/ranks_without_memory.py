"""Ranks with a model, which find no memory in front of some collectives of theirs, in the middle of a step."""

from __future__ import annotations

from typing import Any

import torch

from nanoengine.channel import RankPort
from workers import worker
from workers.parallel import Communicator

# By rank: the numbers of its all-reduces in front of which an allocation fails. A step of the demo model has nine, so
# these lie in prefills and decodes and in several layers, two of them in steps that follow each other.
FAILURES: dict[int, set[int]] = {0: {60, 61, 400}, 1: {150}}


def take_memory_from(communicator: Communicator) -> None:
    """Let the allocations that FAILURES names fail from here on."""
    patched: Any = communicator
    all_reduce, failures, calls = patched.all_reduce, FAILURES[patched.rank], [0]

    def failing(tensor: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] in failures:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")
        return all_reduce(tensor)

    patched.all_reduce = failing


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process."""
    create = worker.create_communicator

    def create_failing(port: RankPort, device: torch.device) -> Communicator:
        communicator = create(port, device)
        take_memory_from(communicator)
        return communicator

    worker.create_communicator = create_failing
    worker.run_worker(port)
