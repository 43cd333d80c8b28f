"""Fixtures of the workers' tests: the compiled kernels, where they can be had."""

from __future__ import annotations

import pytest

from workers.native import NativeKernels, load


@pytest.fixture
def native() -> NativeKernels:
    kernels = load()
    if kernels is None:
        pytest.skip("no AMX tiles of bfloat16 here, or no C compiler")
    return kernels
