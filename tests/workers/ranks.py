"""Runs ranks as threads, and probes whose sums cancel, so that any other order of additions shows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from workers.parallel import Communicator, SharedMemoryCommunicator, ThreadCommunicator

Result = TypeVar("Result")


def shared_group(world_size: int, deadline: float = 5.0, slot_bytes: int = 4096) -> list[SharedMemoryCommunicator]:
    """Ranks of one process over an anonymous file, each mapping it by itself."""
    fd = os.memfd_create("test")
    try:
        return [SharedMemoryCommunicator(rank, world_size, fd, deadline, slot_bytes) for rank in range(world_size)]
    finally:
        os.close(fd)


def run_ranks(
    world_size: int,
    function: Callable[[Communicator], Result],
    deadline: float = 20.0,
    make: Callable[[int, float], Sequence[Communicator]] = ThreadCommunicator.group,
) -> list[Result]:
    """What `function` returns for each rank's communicator, in rank order; raises what a rank raised first."""
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def run(communicator: Communicator) -> None:
        try:
            results[communicator.rank] = function(communicator)
        except BaseException as error:
            errors.append(error)
            communicator.abort()

    threads = [threading.Thread(target=run, args=[communicator]) for communicator in make(world_size, deadline)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]


def cancelling_pair(
    in_features: int, out_features: int, num_rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows x and a weight w whose products sum to zero exactly, so x @ w.T is rounding noise of the order of adding.

    Without this, bfloat16's coarse result hides most differences. One odd input stays as it is.
    """
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features)
    half = in_features // 2
    order = torch.randperm(2 * half, generator=generator)
    weight = torch.randn(out_features, half, generator=generator)
    rows = torch.randn(num_rows, half, generator=generator)
    w = torch.cat((weight, -weight), 1)[:, order]
    x = torch.cat((rows, rows), 1)[:, order]
    if in_features % 2:
        w = torch.cat((w, torch.randn(out_features, 1, generator=generator)), 1)
        x = torch.cat((x, torch.randn(num_rows, 1, generator=generator) * 1e-3), 1)
    return x.to(dtype), w.to(dtype)
