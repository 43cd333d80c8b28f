"""Tells a failed allocation from other failures, and says what did not fit; knows neither steps nor what follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from configs.errors import CapacityError

GIB = 1 << 30

# What the libraries below say of an allocation that failed, where all they raise is a RuntimeError: torch's allocator
# on CPU, CUDA, and C++ in general.
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device; what it was for is lost, and nothing else."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # the former is numpy's, too
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)


@contextlib.contextmanager
def explained(device: torch.device, what: str, advice: str) -> Iterator[None]:
    """Say what does not fit a GPU, beside how much, and what to do.

    Raises:
        CapacityError: the device had not enough memory for what is done inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise CapacityError(
            f"{what} does not fit {device}, of whose {total / GIB:.2f} GiB other processes and what is loaded leave "
            f"{free / GIB:.2f} GiB; {advice}"
        ) from error
