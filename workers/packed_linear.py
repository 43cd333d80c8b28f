"""Linear maps whose every row has the same bits whatever rows stand beside it; knows neither layers nor shards.

oneDNN packs a weight once and multiplies it faster than `F.linear`, mostly with kernels whose order of additions does
not depend on the number of rows M. The operators are private to torch (`torch.ops.mkldnn`), so they are used here
alone, and a plain twin stands ready where they are missing.

Measured with torch 2.13 (oneDNN 3.12) on a Xeon with AMX, 1 to 16 threads, with weights and rows whose products
cancel to zero, so that any other order of additions shows (tests/workers/test_packed_linear.py does the same):

* float32, float16, and bfloat16 without AMX: one result for all M >= 2. A single row is padded to two.
* bfloat16 in AMX tiles, in_features a multiple of 32 and at most 384: one result for all M >= 2.
* bfloat16 in AMX tiles, any other in_features: oneDNN cuts the sum by M, by in_features and by the number of threads
  (and leaves AMX while M * in_features < 64). There the rows go through 32 at a time, padded to 32, so that a weight
  is multiplied in one shape only. On one core that costs 1.2 to 1.9 times what it would for 2 rows and 1.4 to 4
  times for 1,024 rows, which is still several times faster than without AMX.
* The native kernel for bfloat16 in AMX tiles (workers/native/linear.c) has one order of additions for every M, reads
  a weight once however few the rows, and is two to four times as fast as all that. It needs a C compiler.
* `F.linear` on 16 rows gives a row the same bits in any place, for all three types and instruction sets down to AVX2.
  That is the twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch.nn import functional as F

from workers.cpu_features import has_tiles_for
from workers.memory import is_out_of_memory

_AMX_TILE, _AMX_UNCUT, _PLAIN_TILE = 32, 384, 16


class LinearKernel(Protocol):
    """Computes `x @ weight.T + bias` for one weight that it keeps in whatever form suits it."""

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map (num_rows, in_features) to (num_rows, out_features), of the weight's dtype; num_rows may be 0."""


class PackedKernel:
    """oneDNN's packed form of a weight on CPU. The original may be dropped afterwards.

    Raises:
        AttributeError, RuntimeError: torch is built without oneDNN, or oneDNN does not know the type on this processor.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._out_features, in_features = weight.shape
        # 32 is the number of rows that the layout is chosen for; it does not bound the number of rows.
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 32)
        uncut = in_features % 32 == 0 and in_features <= _AMX_UNCUT
        self._tile = _AMX_TILE if has_tiles_for(weight.dtype) and not uncut else None

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        num_rows = x.shape[0]
        if num_rows == 0:
            return x.new_empty(0, self._out_features)
        if self._tile is not None:
            return _in_tiles(self._multiply, x, bias, self._tile)
        missing = compiled_rows(num_rows) - num_rows
        return self._multiply((F.pad(x, (0, 0, 0, missing)) if missing else x).contiguous(), bias)[:num_rows]

    def _multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, bias, "none", [], "")
        return out


class PlainKernel:
    """The twin on CPU: `F.linear`, always over 16 rows."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        if x.shape[0] == 0:
            return x.new_empty(0, self._weight.shape[0])
        return _in_tiles(lambda tile, bias: F.linear(tile, self._weight, bias), x, bias, _PLAIN_TILE)


class DeviceKernel:
    """`F.linear` as it is, for GPUs, where bit-identity is not promised."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """See `LinearKernel`."""
        return F.linear(x, self._weight, bias)


def compiled_rows(num_rows: int) -> int:
    """How many rows are multiplied where so many are asked for: at least 2, and at most an eighth more.

    One row alone takes another kernel. Beyond that, oneDNN compiles the product for each number of rows that it meets,
    some 10 ms and half a MiB a weight, and torch and oneDNN keep a thousand of these each: prompts of every length
    would fill gigabytes. So there are 8 numbers to each power of two from 16 on, 71 in all up to 2,048.
    """
    if num_rows <= 16:
        return max(num_rows, 2)
    step = 1 << (num_rows.bit_length() - 4)
    return -(-num_rows // step) * step


def make_kernel(weight: torch.Tensor) -> LinearKernel:
    """The best kernel for a `weight` (out_features, in_features) that was loaded plain, on the device where it lies."""
    if weight.device.type != "cpu":
        return DeviceKernel(weight)
    try:
        return PackedKernel(weight)
    except (AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise  # the plain one has other bits, and other ranks or groups may have had room
        return PlainKernel(weight)


def _in_tiles(
    multiply: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor],
    x: torch.Tensor,
    bias: torch.Tensor | None,
    size: int,
) -> torch.Tensor:
    """Multiply exactly `size` rows at a time, the last ones padded with zeros."""
    num_rows = x.shape[0]
    missing = -num_rows % size
    tiles = torch.split((F.pad(x, (0, 0, 0, missing)) if missing else x).contiguous(), size)
    if len(tiles) == 1:
        return multiply(tiles[0], bias)[:num_rows]
    return torch.cat([multiply(tile, bias) for tile in tiles])[:num_rows]
