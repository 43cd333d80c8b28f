"""Ranks with a model, which find no memory in front of some collectives of theirs, in the middle of a step."""

from __future__ import annotations

from typing import Any

import torch

from nanoengine.channel import RankPort
from workers import worker
from workers.native import load
from workers.parallel import Communicator, SharedMemoryCommunicator

# By rank: the numbers of its all-reduces in front of which an allocation fails. A step of the demo model has nine, so
# these lie in prefills and decodes and in several layers, two of them in steps that follow each other.
FAILURES: dict[int, set[int]] = {0: {60, 61, 400}, 1: {150}}
# The same where the compiled layers add up without Python: the numbers of the steps whose layers are not reached.
FAILURES_OF_STEPS: dict[int, set[int]] = {0: {7, 8, 44}, 1: {17}}


def _fail() -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")


def take_memory_from(communicator: Communicator) -> None:
    """Let the allocations that FAILURES names fail from here on."""
    patched: Any = communicator
    all_reduce, failures, calls = patched.all_reduce, FAILURES[patched.rank], [0]

    def failing(tensor: torch.Tensor) -> Any:
        calls[0] += 1
        if calls[0] in failures:
            _fail()
        return all_reduce(tensor)

    patched.all_reduce = failing


class WithoutMemory(SharedMemoryCommunicator):
    """Lets the allocations that FAILURES_OF_STEPS names fail."""

    num_steps = 0

    @property
    def progress(self) -> tuple[int, int]:
        """Asked for before the layers of a step, while the others may wait in them already."""
        self.num_steps += 1
        if self.num_steps in FAILURES_OF_STEPS[self.rank]:
            _fail()
        return super().progress


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process."""
    create = worker.create_communicator

    def create_failing(port: RankPort, device: torch.device) -> Communicator:
        communicator = create(port, device)
        if port.config.model.native_kernels and load() is not None:
            communicator.__class__ = WithoutMemory
        else:
            take_memory_from(communicator)
        return communicator

    worker.create_communicator = create_failing
    worker.run_worker(port)
