"""Paged attention with the compiled kernel on CPU; knows no model, scheduler or sampler.

The cache is (num_blocks, 2, num_kv_heads, block_size, head_dim): what is read of a block for one head is one piece of
memory. Where the kernel does not apply, the plain twin (torch_backend.py) takes over, with its own layout.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from workers.attention.torch_backend import TorchBackend
from workers.forward_context import AttentionMetadata
from workers.native import NativeKernels
from workers.native.decoder import AttentionPlan
from workers.native.kernels import LARGEST_HEAD, PLAIN, QUANTUM, ROWS_PER_ITEM


class NativeBackend(TorchBackend):
    """Bfloat16 attention in AMX tiles. Bits depend on a token's own query and keys alone, see native/attention.c."""

    def __init__(self, kernels: NativeKernels) -> None:
        super().__init__(torch.device("cpu"))
        self._kernels = kernels
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._items_key, self._items = b"", torch.empty(0, 3, dtype=torch.int64)
        self._computes_dtype = True

    def check(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """See `AttentionBackend.check`."""
        self._computes_dtype = dtype is torch.bfloat16

    def _applies(self, head_dim: int) -> bool:
        return self._computes_dtype and head_dim % QUANTUM == 0 and head_dim <= LARGEST_HEAD

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """See `AttentionBackend.kv_cache_shape`."""
        if not self._applies(head_dim):
            return super().kv_cache_shape(num_blocks, block_size, num_kv_heads, head_dim)
        return (num_blocks, 2, num_kv_heads, block_size, head_dim)

    def store(self, cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """See `AttentionBackend.store`."""
        if not self._applies(cache.shape[-1]):
            super().store(cache, k, v, slot_mapping)
            return
        self._kernels.store(cache, _tokens_dense(k), _tokens_dense(v), slot_mapping)

    def rotate_and_store(
        self,
        cache: torch.Tensor,
        qkv: torch.Tensor,
        num_heads: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        head_norm: tuple[torch.Tensor, float] | None,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionBackend.rotate_and_store`; overwrites qkv."""
        if not self._applies(cache.shape[-1]):
            return super().rotate_and_store(cache, qkv, num_heads, angles, head_norm, slot_mapping)
        num_rotated = (qkv.shape[1] + num_heads) // 2
        qk = qkv[:, :num_rotated]
        weight, eps = head_norm or (None, 0.0)
        self._kernels.norm_rotate(qk, weight, eps, *angles)
        self._kernels.store(cache, qk[:, num_heads:], qkv[:, num_rotated:], slot_mapping)
        return qk[:, :num_heads]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `workers.layers.norm.add_rms_norm`; leaves the sum in x."""
        if x.dtype is not torch.bfloat16 or x.dim() != 2:
            return super().add_rms_norm(x, residual, weight, eps)
        return self._kernels.add_rms_norm(x, residual, weight, eps)

    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        if not self._applies(cache.shape[-1]):
            return super().forward(q, cache, metadata, scale)
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, block_size = cache.shape[2:4]
        group, num_threads = num_heads // num_kv_heads, torch.get_num_threads()
        plan, q = self.plan(metadata, num_kv_heads, group, head_dim), _tokens_dense(q)
        out = torch.empty(num_tokens, num_heads, head_dim, dtype=q.dtype)
        starts = plan.lengths.data_ptr()
        row = 8 * plan.lengths.shape[1]
        self._kernels.library.nano_attention(
            q.data_ptr(), cache.data_ptr(), out.data_ptr(), plan.items.data_ptr(), plan.items.shape[0],
            plan.tables.data_ptr(), plan.tables.stride(0), starts, starts + row, starts + 2 * row,
            block_size, group, num_kv_heads, head_dim, q.stride(0), scale, PLAIN, plan.scratch.data_ptr(), num_threads,
        )  # fmt: skip
        return out

    def plan(self, metadata: AttentionMetadata, num_kv_heads: int, group: int, head_dim: int) -> AttentionPlan:
        """What every layer of a step repeats: made when it is first asked for."""
        if not isinstance(metadata.plan, AttentionPlan):
            metadata.plan = self._make_native_plan(metadata, num_kv_heads, group, head_dim)
        return metadata.plan

    def _make_native_plan(
        self, metadata: AttentionMetadata, num_kv_heads: int, group: int, head_dim: int
    ) -> AttentionPlan:
        query_lens = np.array(metadata.query_lens, dtype=np.int64)  # (num_seqs,)
        starts = query_lens.cumsum() - query_lens
        blocks = -(-query_lens * group // ROWS_PER_ITEM)  # query blocks of each sequence and K/V head
        key = blocks.tobytes()
        if key != self._items_key:  # steady decodes need the same ones step after step
            self._items_key, self._items = key, _items_of(blocks, num_kv_heads)
        lengths = np.stack((starts, query_lens, np.array(metadata.seq_lens, dtype=np.int64)))
        size = torch.get_num_threads() * self._kernels.library.nano_attention_scratch(head_dim)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        return AttentionPlan(
            items=self._items,
            lengths=torch.from_numpy(lengths),
            tables=metadata.block_tables,
            slots=metadata.slot_mapping,
            block_size=metadata.block_size,
            scratch=self._scratch,
        )


def _items_of(blocks: npt.NDArray[np.int64], num_kv_heads: int) -> torch.Tensor:
    """`AttentionPlan.items` of sequences with so many query blocks each."""
    seqs = np.repeat(np.arange(len(blocks)), blocks)
    number = np.arange(len(seqs)) - np.repeat(blocks.cumsum() - blocks, blocks)  # of a block in its sequence
    items = np.empty((len(seqs), num_kv_heads, 3), dtype=np.int64)
    items[:, :, 0], items[:, :, 2] = seqs[:, None], number[:, None] * ROWS_PER_ITEM
    items[:, :, 1] = np.arange(num_kv_heads)
    # The last blocks have the most keys: begun first, they do not keep the other threads waiting at the end.
    return torch.from_numpy(items[::-1].copy()).view(-1, 3)


def _tokens_dense(x: torch.Tensor) -> torch.Tensor:
    """x (num_tokens, heads, head_dim), copied unless each token is contiguous."""
    dense = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x if dense else x.contiguous()
