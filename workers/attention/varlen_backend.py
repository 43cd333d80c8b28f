"""Paged attention by FlashAttention-2, of the package flash-attn or as PyTorch ships it; knows no model or scheduler.

Both are one function of (num_tokens, num_heads, head_dim) queries, the starts of sequences in them, a table of blocks
and numbers of keys; decodes are sequences of one query. What it reads lies on the device, so a CUDA graph may hold it.

The function of the package that is meant for decodes, `flash_attn_with_kvcache`, is left out: since 2.8.4 it asks the
device for the longest sequence in every layer, which stalls the host and is an error inside a graph.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import itertools

import torch
import torch.nn.functional as F

from workers.attention.library_backend import LibraryBackend
from workers.forward_context import AttentionMetadata
from workers.staging import send


@dataclasses.dataclass(slots=True)
class Plan:
    """What every layer of a step repeats; made by the first. All tensors are int32.

    Attributes:
        query_starts: (num_seqs + 1,), where each sequence's tokens begin in the batch.
        key_starts: (num_seqs + 1,), sums of `seq_lens`.
        seq_lens: (num_seqs,).
        tables: (num_seqs, max_blocks).
        max_query_len, max_seq_len: no sequence has more.
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    seq_lens: torch.Tensor
    tables: torch.Tensor
    max_query_len: int
    max_seq_len: int


class VarlenBackend(LibraryBackend):
    """One call a layer, whatever the batch holds."""

    capturable = True
    head_dims = range(8, 257, 8)
    block_multiple = 256

    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        if not isinstance(metadata.plan, Plan):
            metadata.plan = make_plan(metadata)
        # A view each: (num_blocks, block_size, num_kv_heads, head_dim). The kernels take any strides but the last.
        k, v = (part.transpose(1, 2) for part in cache.unbind(1))
        return self._attend(q, k, v, metadata.plan, scale)

    @abc.abstractmethod
    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor: ...


class FlashAttnBackend(VarlenBackend):
    """https://github.com/Dao-AILab/flash-attention, version 2 (Dao 2023, FlashAttention-2)."""

    name = "flash_attn"
    package = "flash_attn"
    least_version = (2, 6)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._flash_attn_varlen_func = self._library.flash_attn_varlen_func

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
        out: torch.Tensor = self._flash_attn_varlen_func(
            q,
            k,
            v,
            plan.query_starts,
            plan.key_starts,
            plan.max_query_len,
            plan.max_seq_len,
            softmax_scale=scale,
            causal=True,
            block_table=plan.tables,
        )
        return out


class TorchVarlenBackend(VarlenBackend):
    """`torch.nn.attention.varlen`, with the kernels that torch's own CUDA builds hold."""

    name = "torch_varlen"
    package = "torch"
    least_version = (2, 13)

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Not above: it pulls in torch's compiler, which takes seconds.
        self._varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float) -> torch.Tensor:
        num_heads, num_kv_heads = q.shape[1], k.shape[2]
        decodes = plan.max_query_len == 1
        # With pages, torch's kernel may split keys where sequences differ in queries, too, and then puts the parts
        # together wrongly (Dao-AILab/flash-attention#2550). It is right where query heads stand in for queries: one
        # query each, several heads a K/V head, and no window, which one query does not need to be causal.
        splits = None if decodes and num_heads > num_kv_heads else 1
        out: torch.Tensor = self._varlen_attn(
            q,
            k,
            v,
            plan.query_starts,
            plan.key_starts,
            plan.max_query_len,
            plan.max_seq_len,
            scale=scale,
            window_size=(-1, -1) if decodes else (-1, 0),
            enable_gqa=num_heads != num_kv_heads,
            seqused_k=plan.seq_lens,
            block_table=plan.tables,
            num_splits=splits,
        )
        return out


def make_plan(metadata: AttentionMetadata) -> Plan:
    """Of decodes alone it is made on the device from what lies there, so that a captured one sees each step's."""
    device, num_seqs = metadata.block_tables.device, len(metadata.query_lens)
    max_query_len = max(metadata.query_lens)
    if max_query_len == 1:
        query_starts = torch.arange(num_seqs + 1, dtype=torch.int32, device=device)
    else:
        query_starts = send([0, *itertools.accumulate(metadata.query_lens)], device).to(torch.int32)
    seq_lens = metadata.device_seq_lens
    if seq_lens is None:
        seq_lens = send(metadata.seq_lens, device)
    seq_lens = seq_lens.to(torch.int32)
    return Plan(
        query_starts=query_starts,
        key_starts=F.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0)),
        seq_lens=seq_lens,
        tables=metadata.block_tables.to(torch.int32),
        max_query_len=max_query_len,
        max_seq_len=max(metadata.seq_lens),
    )
