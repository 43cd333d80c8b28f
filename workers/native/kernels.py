"""The compiled kernels as functions of tensors; knows no layer, and nothing of how they were compiled.

All of them take bfloat16 on the CPU, are given memory by torch, and run on as many threads as torch does. A row's bits
depend neither on the rows beside it nor on the number of threads. Each has a plain twin in `workers/layers`,
`workers/packed_linear.py` or `workers/attention/torch_backend.py`, which rounds at the same places and adds in another
order.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from typing import Any, Literal

import torch

from workers.cpu_features import cpu_flags
from workers.native.build import CPU_FLAGS, BuildError, build

logger = logging.getLogger(__name__)

_POINTER, _INT64, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[Any], Any]] = {
    "nano_init": ([], _INT),
    "nano_use_large_pages": ([_POINTER, _INT64], None),
    "nano_pack": ([_POINTER, _INT64, _POINTER] + [_INT64] * 4 + [_INT], None),
    "nano_look_up": ([_POINTER] * 3 + [_INT64] * 3 + [_INT], _INT),
    "nano_linear": ([_POINTER] * 4 + [_INT64] * 5 + [_INT] * 3, None),
    "nano_add_rms_norm": ([_POINTER] * 4 + [_INT64] * 2 + [_FLOAT] + [_INT] * 2, None),
    "nano_norm_rotate": ([_POINTER] * 4 + [_INT64] * 5 + [_FLOAT, _INT], None),
    "nano_store": ([_POINTER] * 4 + [_INT64] * 6 + [_INT], None),
    "nano_attention_scratch": ([_INT64], _INT64),
    "nano_attention": (
        [_POINTER] * 4 + [_INT64, _POINTER, _INT64] + [_POINTER] * 3 + [_INT64] * 5 + [_FLOAT, _INT, _POINTER, _INT],
        None,
    ),
    "nano_attention_half": ([_POINTER, _POINTER, _INT64] + [_POINTER] * 3, None),
    "nano_mlp_half": ([_POINTER, _POINTER, _INT64] + [_POINTER] * 3, None),
    "nano_all_reduce": ([_POINTER] * 2 + [_INT64, _INT], _INT),
    "nano_layers": ([_POINTER] * 5, _INT),
}  # fmt: skip
LinearKind = Literal["narrow", "wide", "swiglu"]
_KINDS = {"narrow": 0, "wide": 1, "swiglu": 2}
_ROWS_PUT_AT_ONCE = 4096
"""What is converted on its way takes no more memory than so many rows."""
PLAIN = 0
"""The layout of rows as torch has them; see `IN_TILES` in common.h for the other."""
QUANTUM = 32
"""in_features and head_dim must be a multiple of this."""
LARGEST_HEAD = 1024
ROWS_PER_ITEM = 512
"""Rows of a query block: (token, member of the group that shares a K/V head) of one sequence."""


class NativeLinear:
    """x @ weight.T + bias, the weight in a packed form into which it is `put`, so that it never lies here plain.

    Args:
        kernels: whose it is.
        out_features: rows of the weight.
        in_features: columns of the weight, a multiple of QUANTUM.
        kind: the result: `narrow` bfloat16, `wide` the same sums unrounded in float32, `swiglu` silu(gate) * up of a
            weight that holds gate's rows and then up's: (…, out_features / 2) bfloat16, rounded once.

    Attributes:
        address: of the packed weight.
    """

    def __init__(
        self, kernels: NativeKernels, out_features: int, in_features: int, kind: LinearKind = "narrow"
    ) -> None:
        self._n, self._k = out_features, in_features
        self._half = self._n // 2 if kind == "swiglu" else 0
        num_panels = -(-self._half // 16) if self._half else -(-self._n // 32)
        self._library = kernels.library
        self._packed = torch.empty(num_panels * 32 * self._k, dtype=torch.bfloat16)
        self.address = self._packed.data_ptr()
        if num_panels * 32 != self._n:
            self._packed[-32 * self._k :].zero_()  # the last panel has places for rows that are not there
        self._multiply, self._kind = self._library.nano_linear, _KINDS[kind]
        self._columns = self._half or self._n
        self._dtype = torch.float32 if kind == "wide" else torch.bfloat16

    def put(self, part: torch.Tensor, start: int) -> None:
        """Pack rows of the weight from row `start` on: (num_rows, in_features), of any floating dtype and strides."""
        assert part.shape[1] == self._k
        assert 0 <= start <= self._n - len(part)
        for rows in torch.split(part, _ROWS_PUT_AT_ONCE):
            rows = rows.to(torch.bfloat16)
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            self._library.nano_pack(
                rows.data_ptr(), rows.stride(0), self.address, start, len(rows), self._k, self._half,
                torch.get_num_threads(),
            )  # fmt: skip
            start += len(rows)

    def settle(self) -> None:
        """All rows were put: let the system gather large pages for them, which spare a reader page walks.

        In its own time. Had it to find and clear them at the first touch, a start would take a second a GiB longer on
        a virtual machine whose host must supply them, and 3 % less time for a pass over the weights would come of it.
        """
        self._library.nano_use_large_pages(self.address, self._packed.nbytes)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the weight as they were put: (num_ids,) int64 to (num_ids, in_features). Not of `swiglu`.

        Raises:
            IndexError: there is no such row.
        """
        assert not self._half, "rows of two layers lie side by side"
        ids = ids.contiguous()
        out = torch.empty(len(ids), self._k, dtype=torch.bfloat16)
        found = self._library.nano_look_up(
            self.address, ids.data_ptr(), out.data_ptr(), len(ids), self._n, self._k, torch.get_num_threads()
        )
        if found != 0:
            raise IndexError(f"an index is not in [0, {self._n})")
        return out

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Map (num_rows, in_features), contiguous along in_features, to (num_rows, out_features)."""
        num_rows = x.shape[0]
        out = torch.empty(num_rows, self._columns, dtype=self._dtype)
        if num_rows == 0:
            return out
        if x.stride(1) != 1:
            x = x.contiguous()
        self._multiply(
            x.data_ptr(), self.address, None if bias is None else bias.data_ptr(), out.data_ptr(),
            num_rows, self._n, self._k, x.stride(0), self._columns, self._kind, PLAIN, torch.get_num_threads(),
        )  # fmt: skip
        return out


class NativeKernels:
    """The functions of the library.

    Attributes:
        library: as `ctypes` sees it.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        for name, (arguments, result) in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, result

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm of x + residual, all (num_rows, size); also returns that sum, which overwrites x."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self.library.nano_add_rms_norm(
            x.data_ptr(), None if residual is None else residual.data_ptr(), weight.data_ptr(), out.data_ptr(),
            x.shape[0], x.shape[1], eps, PLAIN, torch.get_num_threads(),
        )  # fmt: skip
        return out, x

    def norm_rotate(
        self, x: torch.Tensor, weight: torch.Tensor | None, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> None:
        """RMSNorm of each head, if there is a weight, then the rotation; in place.

        Args:
            x: (num_tokens, num_heads, head_dim), of which a token is contiguous; head_dim a multiple of QUANTUM.
            weight: (num_heads, head_dim) bfloat16.
            cos: (num_tokens, 1, head_dim / 2) float32, contiguous along the last; and so is sin.
        """
        num_tokens, num_heads, head_dim = x.shape
        self.library.nano_norm_rotate(
            x.data_ptr(), None if weight is None else weight.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            num_tokens, num_heads, head_dim, x.stride(0), cos.stride(0), eps, torch.get_num_threads(),
        )  # fmt: skip

    def store(self, cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """See `AttentionBackend.store`; cache as in `NativeBackend`, a token's K contiguous, and its V."""
        self.library.nano_store(
            k.data_ptr(), v.data_ptr(), slot_mapping.data_ptr(), cache.data_ptr(),
            *k.shape, cache.shape[3], k.stride(0), v.stride(0), torch.get_num_threads(),
        )  # fmt: skip


@functools.cache
def load() -> NativeKernels | None:
    """The kernels, compiled if they were not before; None, and a line in the log, where they cannot be had."""
    missing = [flag for flag in CPU_FLAGS if flag not in cpu_flags()]
    if missing:
        logger.debug("no native kernels: the processor lacks %s", ", ".join(missing))
        return None
    try:
        library = ctypes.CDLL(str(build()))
    except (BuildError, OSError) as error:
        logger.warning("no native kernels, so bfloat16 is computed more slowly: %s", error)
        return None
    kernels = NativeKernels(library)
    if kernels.library.nano_init() != 0:
        logger.warning("no native kernels, so bfloat16 is computed more slowly: the system withholds AMX tiles")
        return None
    return kernels
