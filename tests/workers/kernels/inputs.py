"""What the tests of kernels share: the device they run on, and tolerances; skips them where Triton is missing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""A GPU if there is one; on a CPU the kernels run under Triton's interpreter (tests/conftest.py)."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Two bits of a value: the interpreter cuts bfloat16 off where a GPU rounds it, once inside and once at the end."""


def assert_near(computed: torch.Tensor, twin: torch.Tensor) -> None:
    """Equal up to `TOLERANCE` of each element, or of 1 where it is smaller."""
    assert computed.dtype == twin.dtype
    tolerance = TOLERANCE[twin.dtype]
    torch.testing.assert_close(computed.cpu().double(), twin.cpu().double(), rtol=tolerance, atol=tolerance)
