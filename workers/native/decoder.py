"""All layers of a decoder in one call of the compiled kernels; knows no module, only where their weights lie.

The plain twin is `workers/models/decoder.py: DecoderLayer`, whose kernels are the same: bits do not differ.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from collections.abc import Sequence

import torch

from workers.native.group import NativeGroup
from workers.native.kernels import NativeKernels, NativeLinear
from workers.parallel import Communicator, SharedMemoryCommunicator

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64


@dataclasses.dataclass(frozen=True)
class LayerWeights:
    """What a layer computes with on this rank; norms are bfloat16 (size,), head_norm (heads + kv_heads, head_dim)."""

    input_norm: torch.Tensor
    qkv: NativeLinear
    qkv_bias: torch.Tensor | None
    head_norm: torch.Tensor | None
    o: NativeLinear
    o_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: NativeLinear
    gate_up_bias: torch.Tensor | None
    down: NativeLinear
    down_bias: torch.Tensor | None


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """Sizes of every layer, this rank's share of them."""

    size: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    scale: float


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How a step's tokens divide into sequences, for the kernel.

    Attributes:
        items: (num_items, 3) int64: sequence, K/V head and first row of each query block.
        lengths: (3, num_seqs) int64: first token, number of tokens, number of keys of each sequence.
        tables: (num_seqs, max_blocks) int64 block tables.
        slots: (num_tokens,) int64, where each token's K/V is stored.
        block_size: tokens in a block.
        scratch: bytes for the threads, which nobody else uses while a step is computed.
    """

    items: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    slots: torch.Tensor
    block_size: int
    scratch: torch.Tensor


class _Model(ctypes.Structure):  # decoder.c: Model
    _fields_ = [
        ("layers", _POINTER),
        *((name, _INT64) for name in ("num_layers", "size", "heads", "kv_heads", "dim", "intermediate")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Step(ctypes.Structure):  # decoder.c: Step
    _fields_ = [
        *((name, _INT64) for name in ("tokens", "angle_stride", "num_items", "table_stride", "block_size", "threads")),
        *((name, _POINTER) for name in ("cos", "sin", "slots", "items", "tables", "starts", "query_lens", "seq_lens")),
        *((name, _POINTER) for name in ("caches", "scratch", "normed", "qkv", "attended", "gated")),
    ]


class NativeLayers:
    """The layers of one rank.

    Args:
        kernels: whose functions compute.
        layers: their weights, which are kept alive.
        shape: their sizes.
        communicator: this rank's; a group of one, or one that shares memory, needs a single call a step.

    Attributes:
        shape: as given.
    """

    def __init__(
        self, kernels: NativeKernels, layers: Sequence[LayerWeights], shape: LayerShape, communicator: Communicator
    ) -> None:
        self._library, self._layers, self.shape, self._communicator = kernels.library, layers, shape, communicator
        self._group = NativeGroup(communicator) if isinstance(communicator, SharedMemoryCommunicator) else None
        fields = [field.name for field in dataclasses.fields(LayerWeights)]
        addresses = [_address(getattr(layer, name)) for layer in layers for name in fields]
        self._addresses = (_POINTER * len(addresses))(*addresses)
        self._model = _Model(
            ctypes.addressof(self._addresses), len(layers), shape.size, shape.heads, shape.kv_heads, shape.head_dim,
            shape.intermediate, shape.eps, shape.scale,
        )  # fmt: skip
        own, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self._widths = (shape.size, own + 2 * kv, own, shape.intermediate)
        self._workspace = torch.empty(0, dtype=torch.bfloat16)
        self._caches: list[torch.Tensor] = []
        self._cache_addresses = (_POINTER * 0)()

    def __call__(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        caches: list[torch.Tensor],
        plan: AttentionPlan,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's contribution, and the residual stream that it has not been added to yet.

        Args:
            hidden: (num_tokens, size) bfloat16, contiguous; overwritten.
            cos, sin: see `NativeKernels.norm_rotate`.
            caches: a tensor a layer, laid out as `NativeBackend`'s.
            plan: of this step.

        Raises:
            WorkerError: another rank failed, gave the step up, or came to no collective in time.
        """
        step = self._describe(len(hidden), cos, sin, caches, plan)
        library, model, about = self._library, ctypes.byref(self._model), ctypes.byref(step)
        if self._group is not None or self._communicator.world_size == 1:
            residual = torch.empty_like(hidden)
            compute = functools.partial(library.nano_layers, model, about, hidden.data_ptr(), residual.data_ptr())
            compute(None) if self._group is None else self._group.call(compute)
            return hidden, residual
        before: torch.Tensor | None = None
        for index in range(len(self._layers)):
            for half in (library.nano_attention_half, library.nano_mlp_half):
                out = torch.empty_like(hidden)
                residual_address = None if before is None else before.data_ptr()
                half(model, about, index, hidden.data_ptr(), residual_address, out.data_ptr())
                before, hidden = hidden, self._communicator.all_reduce(out)
        assert before is not None, "a decoder has layers"
        return hidden, before

    def _describe(
        self, num_tokens: int, cos: torch.Tensor, sin: torch.Tensor, caches: list[torch.Tensor], plan: AttentionPlan
    ) -> _Step:
        if caches is not self._caches:
            self._caches = caches
            self._cache_addresses = (_POINTER * len(caches))(*(cache.data_ptr() for cache in caches))
        # Kept from step to step: fresh pages would cost more than what is computed in them.
        num_rows = -(-num_tokens // 32) * 32  # tiles of rows come in twos
        needed = num_rows * sum(self._widths)
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed, dtype=torch.bfloat16)
        places = [self._workspace.data_ptr()]
        for width in self._widths:
            places.append(places[-1] + 2 * num_rows * width)
        starts, row = plan.lengths.data_ptr(), 8 * plan.lengths.shape[1]
        return _Step(
            num_tokens, cos.stride(0), len(plan.items), plan.tables.stride(0), plan.block_size, torch.get_num_threads(),
            cos.data_ptr(), sin.data_ptr(), plan.slots.data_ptr(), plan.items.data_ptr(), plan.tables.data_ptr(),
            starts, starts + row, starts + 2 * row, ctypes.addressof(self._cache_addresses), plan.scratch.data_ptr(),
            *places[:-1],
        )  # fmt: skip


def _address(what: torch.Tensor | NativeLinear | None) -> int | None:
    if isinstance(what, NativeLinear):
        return what.address
    return None if what is None else what.data_ptr()
