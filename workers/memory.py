"""Tells a failed allocation from any other failure of a step; knows neither what was allocated nor what follows."""

from __future__ import annotations

import torch

# What the libraries below say of an allocation that failed, where all they raise is a RuntimeError: torch's allocator
# on CPU, CUDA, and C++ in general.
_SAYINGS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on the device; what it was for is lost, and nothing else."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):  # the former is numpy's, too
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error).lower() for saying in _SAYINGS)
