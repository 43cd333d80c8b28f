"""Linear layers split over the ranks, fused where the inputs are the same; knows no model and no checkpoint file.

A column-parallel layer splits its outputs, so each rank computes some of them from the whole input; a row-parallel
one splits its inputs, and the ranks' results are added. Where the native kernels apply, the weight is packed for them
as it is loaded. Elsewhere `finish_loading` hands the loaded weight to the kernel that computes with it, and where that
keeps a form of its own (packed for oneDNN) the original is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from workers.layers.parameter import Shard, ShardedParameter
from workers.native import NativeKernels, NativeLinear
from workers.native.kernels import QUANTUM, LinearKind
from workers.packed_linear import LinearKernel, make_kernel
from workers.parallel import Communicator, divide, divide_kv_heads


class LinearBase(nn.Module):
    """y = x @ weight.T + bias with this rank's weight; subclasses say which part of the checkpoint's that is."""

    weight: ShardedParameter | None
    bias: ShardedParameter | None

    def __init__(self) -> None:
        super().__init__()
        self._kernel: LinearKernel | None = None

    def finish_loading(self) -> None:
        """Choose the kernel, if that is not done; call once, when the weight is loaded."""
        assert self.weight is not None
        if self._kernel is None:
            self._kernel = make_kernel(self.weight.data)
        elif isinstance(self._kernel, NativeLinear):
            self._kernel.settle()
        self.weight = None  # the kernel has it

    @property
    def kernel(self) -> LinearKernel | None:
        """What computes; a `NativeLinear` is there from the beginning, another after `finish_loading`."""
        return self._kernel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens, in_features) to (num_tokens, this rank's out_features)."""
        assert self._kernel is not None, "finish_loading() comes first"
        return self._kernel(x, self.bias)


def native_linear(
    native: NativeKernels | None, shape: tuple[int, int], dtype: torch.dtype, kind: LinearKind = "narrow"
) -> NativeLinear | None:
    """What packs and multiplies by a weight (out_features, in_features), where `native` is given and applies."""
    if native is None or dtype is not torch.bfloat16 or shape[1] % QUANTUM:
        return None
    return NativeLinear(native, *shape, kind)


class ColumnParallelLinear(LinearBase):
    """One or several layers with the same input, each split by its outputs; their results stand side by side.

    Args:
        in_features: size of the input, whole on every rank.
        parts: the fused layers by the checkpoint's name: total outputs, this rank's first, and how many it holds.
        native: kernels that compute, on CPU, where they apply.
        kind: what they make of the outputs; see `NativeLinear`.
    """

    def __init__(
        self,
        in_features: int,
        parts: dict[str, tuple[int, int, int]],
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        native: NativeKernels | None = None,
        kind: LinearKind = "narrow",
    ) -> None:
        super().__init__()
        weight_shards, bias_shards, target = {}, {}, 0
        for name, (total, start, size) in parts.items():
            weight_shards[name] = Shard((total, in_features), 0, start, size, target)
            bias_shards[name] = Shard((total,), 0, start, size, target)
            target += size
        shape = (target, in_features)
        self._kernel = packed = native_linear(native, shape, dtype, kind)
        self.weight = ShardedParameter(shape, weight_shards, dtype, device, packed)
        self.bias = ShardedParameter((target,), bias_shards, dtype, device) if bias else None


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Layers of equal size fused along their outputs, e.g. gate_proj and up_proj."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        names: Sequence[str],
        bias: bool,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        native: NativeKernels | None = None,
        kind: LinearKind = "narrow",
    ) -> None:
        share = divide(out_features, communicator.world_size, f"the size of {names[0]}")
        part = (out_features, communicator.rank * share, share)
        super().__init__(in_features, dict.fromkeys(names, part), bias, dtype, device, native, kind)


class QKVParallelLinear(ColumnParallelLinear):
    """q_proj, k_proj and v_proj in one. K/V heads fewer than ranks are replicated on the ranks that share them.

    Attributes:
        num_heads: query heads of this rank.
        num_kv_heads: K/V heads of this rank.
    """

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        native: NativeKernels | None = None,
    ) -> None:
        rank, world_size = communicator.rank, communicator.world_size
        heads = divide(num_heads, world_size, "num_attention_heads")
        first_kv, kv_heads = divide_kv_heads(num_kv_heads, rank, world_size)
        kv_part = (num_kv_heads * head_dim, first_kv * head_dim, kv_heads * head_dim)
        parts = {
            "q_proj": (num_heads * head_dim, rank * heads * head_dim, heads * head_dim),
            "k_proj": kv_part,
            "v_proj": kv_part,
        }
        super().__init__(in_features, parts, bias, dtype, device, native)
        self.num_heads, self.num_kv_heads = heads, kv_heads


class RowParallelLinear(LinearBase):
    """A layer split by its inputs: each rank maps its part of them, and the results are added in rank order."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        native: NativeKernels | None = None,
    ) -> None:
        super().__init__()
        self._communicator = communicator
        share = divide(in_features, communicator.world_size, "the input size of a row-parallel layer")
        shard = Shard((out_features, in_features), 1, communicator.rank * share, share)
        shape = (out_features, share)
        self._kernel = packed = native_linear(native, shape, dtype)
        self.weight = ShardedParameter(shape, {"": shard}, dtype, device, packed)
        self.bias = None
        if bias:
            # Added once, by rank 0. The others know of the tensor but hold nothing of it.
            size = out_features if communicator.rank == 0 else 0
            self.bias = ShardedParameter((size,), {"": Shard((out_features,), size=size)}, dtype, device)

    def finish_loading(self) -> None:
        """See `LinearBase`."""
        super().finish_loading()
        if self._communicator.rank != 0:
            self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens, this rank's in_features) to (num_tokens, out_features), whole on every rank."""
        return self._communicator.all_reduce(super().forward(x))
