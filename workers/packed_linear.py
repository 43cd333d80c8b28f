"""Linear maps whose every row has the same bits whatever rows stand beside it; knows neither layers nor shards.

oneDNN packs a weight once and multiplies it faster than `F.linear`, and its kernels add along a row in an order
that does not depend on how many rows there are, which `F.linear` does not promise. The operators are private to
torch (`torch.ops.mkldnn`), so they are used here alone, and the plain twin stands ready where they are missing.

Measured with torch 2.13 (oneDNN 3.12) on a Xeon with AMX, 1 and 2 threads, 17 shapes, every M from 2 to 139 and 30
larger ones, with weights and inputs that cancel to zero, so that any other order of additions shows:

* float32, float16, and bfloat16 with AVX512 only: one result for all M >= 2. A single row is padded to two.
* bfloat16 in AMX tiles: one result while in_features <= 480. Above, oneDNN cuts the sum differently by M, but all
  M from 2 to 32 agree for every shape tried. There the rows go through in tiles of at most 32: decoding costs the
  same, a prefill of 256 rows or more 1.5 to 2.8 times as much, still 5 to 10 times faster than without AMX.
* `F.linear` at exactly 16 rows gives a row the same bits in any place, for all three types. That is the twin.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional as F

from workers.cpu_features import has_tiles_for

# Rows that AMX kernels of one weight agree on, and the longest sum that they never cut (measured: 480).
_AMX_ROWS, _AMX_UNCUT = 32, 384
# Rows of one call of the twin.
_PLAIN_ROWS = 16


class LinearKernel(Protocol):
    """Computes `x @ weight.T + bias` for one weight that it keeps in whatever form suits it."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map (num_rows, in_features) to (num_rows, out_features), of the weight's dtype; num_rows may be 0."""


class PackedKernel:
    """oneDNN's packed form of a weight on CPU. The original may be dropped afterwards."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, in_features = weight.shape
        # 32: the number of rows that the layout is chosen for; it does not bound the number of rows.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        cut = in_features > _AMX_UNCUT and has_tiles_for(_name(weight.dtype))
        self._max_rows = _AMX_ROWS if cut else None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        x = x.contiguous()
        num_rows = x.shape[0]
        if self._max_rows is None or num_rows <= self._max_rows:
            return self._multiply(x, bias)
        out = x.new_empty(num_rows, self.out_features)
        for start in range(0, num_rows, self._max_rows):
            rows = slice(start, start + self._max_rows)
            out[rows] = self._multiply(x[rows], bias)
        return out

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, self.out_features)
        if num_rows == 1:  # one row alone would take another kernel, with other bits
            x = x.expand(2, -1).contiguous()
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out[:num_rows]


class PlainKernel:
    """The twin on CPU: `F.linear`, always over 16 rows at a time, so that it has one shape only."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        num_rows = x.shape[0]
        padded = F.pad(x, (0, 0, 0, -num_rows % _PLAIN_ROWS))
        tiles = [F.linear(tile, self._weight, bias) for tile in torch.split(padded, _PLAIN_ROWS)]
        return torch.cat(tiles)[:num_rows] if num_rows else x.new_empty(0, self._weight.shape[0])


class DeviceKernel:
    """`F.linear` as it is, for GPUs, where bit-identity is not promised."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        return F.linear(x, self._weight, bias)


def make_kernel(weight: torch.Tensor) -> LinearKernel:
    """The best kernel for `weight` (out_features, in_features) on the device where it lies."""
    if weight.device.type != "cpu":
        return DeviceKernel(weight)
    try:
        return PackedKernel(weight)
    except (AttributeError, RuntimeError):
        # Built without oneDNN, or oneDNN does not know the type on this processor (bfloat16 before AVX512, say).
        return PlainKernel(weight)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
