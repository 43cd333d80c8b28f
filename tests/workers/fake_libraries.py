"""Plain twins, on the CPU, of the functions of other libraries that attention backends call; they know no backend.

Each has the documented signature and refuses what the real one refuses: types, shapes, strides, sizes of pages. What
the real one would compute wrongly without a word is an AssertionError here.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

HALF = (torch.float16, torch.bfloat16)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    """Let every device count as a GPU."""
    monkeypatch.setattr("workers.attention.library_backend.compute_capability", lambda device: capability)


def require(condition: bool, message: str) -> None:
    """What TORCH_CHECK does."""
    if not condition:
        raise RuntimeError(message)


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: list[int], tables: list[list[int]],
    seq_lens: list[int], scale: float, causal: bool,
) -> torch.Tensor:  # fmt: skip
    """Of q (num_tokens, num_heads, head_dim) over pages (num_pages, page_size, num_kv_heads, head_dim), in float32."""
    out = torch.zeros_like(q)
    for (first, end), pages, seq_len in zip(itertools.pairwise(starts), tables, seq_lens, strict=True):
        if not seq_len:
            continue
        keys, values = (part[pages].flatten(0, 1)[:seq_len].float() for part in (k, v))
        group = q.shape[1] // k.shape[2]
        keys, values = keys.repeat_interleave(group, dim=1), values.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:end].float(), keys) * scale
        if causal:  # aligned to the lower right corner
            last = torch.arange(end - first) + seq_len - (end - first)
            scores = scores.masked_fill(torch.arange(seq_len) > last[:, None], -torch.inf)
        out[first:end] = torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), values).to(q.dtype)
    return out


def check_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int,
    block_table: torch.Tensor,
) -> None:  # fmt: skip
    """The checks of FlashAttention-2's `mha_varlen_fwd` with pages, and that the bounds are bounds."""
    require(q.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    require(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    for tensor in (cu_q, cu_k, block_table):
        require(tensor.dtype == torch.int32, "cu_seqlens and block_table must have dtype int32")
    require(q.stride(-1) == k.stride(-1) == v.stride(-1) == block_table.stride(-1) == 1, "last dimension")
    require(cu_q.is_contiguous() and cu_k.is_contiguous(), "cu_seqlens must be contiguous")
    num_pages, page_size, num_kv_heads, head_dim = k.shape
    require(page_size % 256 == 0, "Paged KV cache block size must be divisible by 256")
    require(head_dim % 8 == 0 and head_dim <= 256, "head_size")
    require(q.shape[1] % num_kv_heads == 0, "Number of heads in key/value must divide number of heads in query")
    num_seqs = len(cu_q) - 1
    require(q.shape[2] == head_dim and v.shape == k.shape, "shapes of q, k and v")
    require(cu_k.shape == (num_seqs + 1,) and block_table.shape[0] == num_seqs > 0, "batch size")
    assert type(max_q) is int
    assert type(max_k) is int
    lens_q, lens_k = cu_q.diff(), cu_k.diff()
    assert (cu_q[0], cu_q[-1], cu_k[0]) == (0, len(q), 0)
    assert max_q >= int(lens_q.max())
    assert max_k >= int(lens_k.max())
    assert int(lens_k.max()) <= block_table.shape[1] * page_size, "it would read past the table"
    assert 0 <= int(block_table.min()) <= int(block_table.max()) < num_pages


def pages_of(block_table: torch.Tensor, seq_lens: list[int], page_size: int) -> list[list[int]]:
    return [row[: -(-length // page_size)] for row, length in zip(block_table.tolist(), seq_lens, strict=True)]


# ------------------------------------------------------------------------------------------------- flash-attn 2.8


def flash_attn_varlen_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, deterministic: bool = False, return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    assert block_table is not None
    assert (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs) == (0.0, (-1, -1), 0.0, None, False)
    check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lens = cu_seqlens_k.diff().tolist()
    tables = pages_of(block_table, lens, k.shape[1])
    return dense_attention(q, k, v, cu_seqlens_q.tolist(), tables, lens, scale, causal)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch, version: str = "2.8.3.post1") -> None:
    module = types.ModuleType("flash_attn")
    module.__dict__.update(__version__=version, flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)


# ------------------------------------------------------------------------------------------------- torch 2.13


def _flash_attention_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cum_seq_q: torch.Tensor, cum_seq_k: torch.Tensor,
    max_q: int, max_k: int, dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
    window_size_left: int | None = None, window_size_right: int | None = None, seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None, block_table: torch.Tensor | None = None, num_splits: int | None = None,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    assert block_table is not None
    assert seqused_k is not None
    check_varlen(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, block_table)
    require(seqused_k.dtype == torch.int32 and seqused_k.is_contiguous(), "seqused_k must be int32 and contiguous")
    require(seqused_k.shape == (len(cum_seq_q) - 1,), "seqused_k")
    grouped = max_q == 1 and query.shape[1] > key.shape[2] and (window_size_left, window_size_right) == (-1, -1)
    assert num_splits == 1 or grouped, "sequences of several queries would be split, and put together wrongly"
    causal = is_causal or window_size_right == 0
    lens, scale = seqused_k.tolist(), query.shape[-1] ** -0.5 if scale is None else scale
    tables = pages_of(block_table, lens, key.shape[1])
    out = dense_attention(query, key, value, cum_seq_q.tolist(), tables, lens, scale, causal)
    nothing = torch.empty(0, dtype=torch.uint64)
    return out, torch.zeros(query.shape[1], len(query)), nothing, nothing.clone(), torch.empty(0)


@contextlib.contextmanager
def torch_varlen_on_cpu() -> Iterator[None]:
    """Give the operator behind torch's real `varlen_attn` an implementation on the CPU, where it has none."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", _flash_attention_forward, "CPU")
        yield


# ------------------------------------------------------------------------------------------------- FlashInfer 0.6


class _PagedWrapper:
    """What their two wrappers share. `plans` and `runs` count calls, for tests."""

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str) -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert not float_workspace_buffer.any(), "it must be 0 at first"
        self._layout, self.plans, self.runs = kv_layout, 0, 0

    def _plan(
        self, qo_indptr: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int, causal: bool, sm_scale: float | None,
        q_data_type: torch.dtype, kv_data_type: torch.dtype | None,
    ) -> None:  # fmt: skip
        for tensor in (qo_indptr, indptr, indices, last_page_len):
            require(tensor.dtype == torch.int32 and tensor.dim() == 1, "index tensors must be int32, one dimension")
        require(head_dim in (64, 128, 256, 512), f"Unsupported head_dim: {head_dim}")
        require(q_data_type in HALF, f"no kernel for {q_data_type}")
        num_seqs = len(last_page_len)
        assert len(qo_indptr) == len(indptr) == num_seqs + 1
        assert (indptr[0], indptr[-1]) == (0, len(indices))
        assert bool((last_page_len >= 1).all())
        assert bool((last_page_len <= page_size).all())
        assert all(type(number) is int for number in (num_qo_heads, num_kv_heads, head_dim, page_size))
        self._starts, self._causal = qo_indptr.tolist(), causal
        self._tables = [indices[first:end].tolist() for first, end in itertools.pairwise(indptr.tolist())]
        last_lens = last_page_len.tolist()
        self._lens = [(len(pages) - 1) * page_size + last for pages, last in zip(self._tables, last_lens, strict=True)]
        self._heads, self._page = num_qo_heads, (num_kv_heads, page_size, head_dim)
        self._scale = head_dim**-0.5 if sm_scale is None else sm_scale
        self._dtypes = q_data_type, q_data_type if kv_data_type is None else kv_data_type
        self.plans += 1

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor) -> torch.Tensor:
        require(self.plans > 0, "plan() comes first")
        require(self._layout == "HND", "this twin knows one layout")
        if (q.dtype, paged_kv_cache.dtype) != self._dtypes:
            raise ValueError(f"planned for {self._dtypes}, got {q.dtype} and {paged_kv_cache.dtype}")
        require(paged_kv_cache.shape[1:] == (2, *self._page), f"shape of the cache, {paged_kv_cache.shape}")
        require(q.shape == (self._starts[-1], self._heads, self._page[2]), f"shape of q, {q.shape}")
        k, v = (part.transpose(1, 2) for part in paged_kv_cache.unbind(1))
        self.runs += 1
        return dense_attention(q, k, v, self._starts, self._tables, self._lens, self._scale, self._causal)


class BatchDecodeWithPagedKVCacheWrapper(_PagedWrapper):
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout)
        self._groups = None if use_tensor_cores else (1, 2, 3, 4, 6, 8)

    def plan(
        self, indptr: torch.Tensor, indices: torch.Tensor, last_page_len: torch.Tensor, num_qo_heads: int,
        num_kv_heads: int, head_dim: int, page_size: int, *, sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16, kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        group = num_qo_heads // num_kv_heads
        require(self._groups is None or group in self._groups, f"Unsupported group_size: {group}")
        rows = torch.arange(len(indptr), dtype=torch.int32)
        self._plan(
            rows, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, False, sm_scale,
            q_data_type, kv_data_type,
        )  # fmt: skip


class BatchPrefillWithPagedKVCacheWrapper(_PagedWrapper):
    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False
    ) -> None:
        super().__init__(float_workspace_buffer, kv_layout)

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
        head_dim_vo: int | None = None, custom_mask: torch.Tensor | None = None,
        packed_custom_mask: torch.Tensor | None = None, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, sm_scale: float | None = None, window_left: int = -1,
        logits_soft_cap: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
        q_data_type: torch.dtype = torch.float16, kv_data_type: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        assert (head_dim_vo, custom_mask, packed_custom_mask, pos_encoding_mode) == (None, None, None, "NONE")
        assert (use_fp16_qk_reduction, window_left, logits_soft_cap) == (False, -1, None)
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
            head_dim_qk, page_size, causal, sm_scale, q_data_type, kv_data_type,
        )  # fmt: skip


def install_flashinfer(monkeypatch: pytest.MonkeyPatch, version: str = "0.6.18") -> None:
    module: Any = types.ModuleType("flashinfer")
    module.__version__ = version
    for wrapper in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper):
        setattr(module, wrapper.__name__, wrapper)
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr("workers.attention.flashinfer_backend.LEAST_WORKSPACE_BYTES", 1 << 10)
