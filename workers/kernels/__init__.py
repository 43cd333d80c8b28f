"""Triton kernels, each beside a launcher with the signature of its plain-torch twin; they know no model and no step.

A kernel is compiled for a GPU at its first call. On a CPU it runs under Triton's interpreter, where the variable
TRITON_INTERPRET is 1 when triton is first imported: thousands of times slower, but with the same arithmetic, which is
what the tests use (tests/workers/kernels) and what `--attention-backend triton` needs on a CPU.

Kernels compute in float32 and round where their twins do. Sums are taken in another order than the twins', so that on
16-bit types a result may differ in its last bit.
"""

from __future__ import annotations

import os

# Triton warns when nobody says whether a * b + c may be one operation; its default is to change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below `number`, which is at least 1: the size of a block that holds it."""
    return 1 << (number - 1).bit_length()
