"""Paged attention in plain torch, for CPU and CUDA: gather a sequence's K/V into a dense buffer, then fused SDPA.

It knows no model, scheduler or sampler; it is the slow twin that other backends are tested against.

Row-invariance (DESIGN.md, 3.6): on CPU the bits of a token's output depend on its own query and keys alone. The
fused CPU kernel walks queries in blocks of at most 32 rows and keys in tiles of 512, the last one shorter, with a
matrix product each; and the matrix library takes another kernel (hence other bits) for few rows, for another number
of keys, and for a product that it may spread over several threads. So here

* a row at position p always meets exactly `round_up(p + 1, 64)` keys, whatever the chunk that it is computed in;
  prompts are cut at multiples of 64 positions for it, which also saves the upper half of the causal square;
* it does so in a block of 8, 16, 24 or 32 rows, always 32 with heads larger than 128: measured with torch 2.13,
  8 rows and 32 agree up to there. From 64 rows on the kernel may repack bfloat16 operands, depending on the batch;
* a call holds at least two blocks, so that threads divide blocks and never a product.

tests/workers/test_attention_bits.py compares the bits.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from workers.attention.base import AttentionBackend
from workers.forward_context import AttentionMetadata

ROW_QUANTUM = 8
ROW_BLOCK = 32
LARGEST_HEAD_IN_SMALL_BLOCKS = 128
KEY_QUANTUM = 64
# A GPU is promised nothing about bits and suffers from many small launches.
CUDA_ROW_BLOCK = 4096
CUDA_KEY_QUANTUM = 512

# Gathered K/V of one call; small enough to stay in a CPU's caches between the gather and its use.
WORKSPACE_BYTES = 8 << 20
CUDA_WORKSPACE_BYTES = 256 << 20


def row_quantum(head_dim: int) -> int:
    """What the rows of a block are padded to a multiple of."""
    return ROW_QUANTUM if head_dim <= LARGEST_HEAD_IN_SMALL_BLOCKS else ROW_BLOCK


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


@dataclasses.dataclass(slots=True)
class _Decodes:
    """Sequences with one new token each and the same padded number of keys, computed in one call.

    Attributes:
        tokens: (num_seqs,) int64, their rows of the flat batch.
        slots: (num_seqs * num_keys,) int64, where their keys lie.
        mask: (num_seqs, 1, 1, num_keys), 0 or -inf, dtype of the queries.
    """

    tokens: torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor
    num_keys: int


@dataclasses.dataclass(slots=True)
class _Segment:
    """Consecutive tokens of one sequence that meet the same number of keys.

    Attributes:
        start, end: their rows of the flat batch.
        positions: (rows of all blocks,) int64, the position of each (token, group member) row.
    """

    start: int
    end: int
    positions: torch.Tensor
    num_keys: int
    rows_per_block: int


@dataclasses.dataclass(slots=True)
class _Chunk:
    """A chunk of one sequence's prompt: its keys are gathered once, (num_keys,) int64 `slots`, for all segments."""

    slots: torch.Tensor
    segments: list[_Segment]


@dataclasses.dataclass(slots=True)
class _Plan:
    """What every layer of a step repeats; made by the first."""

    decodes: list[_Decodes]
    chunks: list[_Chunk]


class TorchBackend(AttentionBackend):
    """Attention without a compiler. One instance serves one rank: it owns the buffer that K/V is gathered into."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._key_quantum = CUDA_KEY_QUANTUM if on_gpu else KEY_QUANTUM
        self._row_block = CUDA_ROW_BLOCK if on_gpu else ROW_BLOCK
        self._workspace_bytes = CUDA_WORKSPACE_BYTES if on_gpu else WORKSPACE_BYTES
        self._workspace: torch.Tensor | None = None

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """(num_blocks, block_size, 2, num_kv_heads, head_dim): one gather finds a token's K and V."""
        return (num_blocks, block_size, 2, num_kv_heads, head_dim)

    def store(self, cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """See `AttentionBackend.store`."""
        slots = cache.flatten(0, 1)  # (num_slots, 2, num_kv_heads, head_dim), a view
        slots.index_copy_(0, slot_mapping, torch.stack((k, v), dim=1))

    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        num_kv_heads, head_dim = cache.shape[-2:]
        group = q.shape[1] // num_kv_heads
        if not isinstance(metadata.plan, _Plan):
            bytes_per_key = 2 * num_kv_heads * head_dim * cache.element_size()
            metadata.plan = self._make_plan(metadata, q, group, max(1, self._workspace_bytes // bytes_per_key))
        out = torch.empty_like(q)  # (num_tokens, num_heads, head_dim)
        for decodes in metadata.plan.decodes:
            self._run_decodes(decodes, q, cache, group, scale, out)
        for chunk in metadata.plan.chunks:
            k, v = self._gather(cache, chunk.slots, 1)
            for segment in chunk.segments:
                _run_segment(segment, q, k, v, group, scale, out)
        return out

    def _gather(self, cache: torch.Tensor, slots: torch.Tensor, num_seqs: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, each (num_seqs, num_kv_heads, num_keys, head_dim): views of the workspace, until the next call."""
        shape = (slots.numel(), *cache.shape[2:])  # (num_seqs * num_keys, 2, num_kv_heads, head_dim)
        numel = slots.numel() * cache.stride(1)
        space = self._workspace
        if space is None or space.numel() < numel or space.dtype != cache.dtype:
            # Kept from call to call: fresh pages for every gather cost more than the copy itself.
            space = self._workspace = torch.empty(numel, dtype=cache.dtype, device=cache.device)
        dense = space[:numel].view(shape)
        torch.index_select(cache.flatten(0, 1), 0, slots, out=dense)
        kv = dense.view(num_seqs, -1, *shape[1:]).permute(2, 0, 3, 1, 4)
        return kv[0], kv[1]

    def _run_decodes(
        self, decodes: _Decodes, q: torch.Tensor, cache: torch.Tensor, group: int, scale: float, out: torch.Tensor
    ) -> None:
        num_seqs, head_dim = decodes.tokens.numel(), q.shape[-1]
        k, v = self._gather(cache, decodes.slots, num_seqs)
        rows = q.index_select(0, decodes.tokens).view(num_seqs, -1, group, head_dim)
        num_rows = round_up(group, row_quantum(head_dim))
        rows = F.pad(rows, (0, 0, 0, num_rows - group))  # (num_seqs, num_kv_heads, num_rows, head_dim)
        attended = _attend(rows, k, v, decodes.mask.expand(-1, 1, num_rows, -1), scale)
        out.index_copy_(0, decodes.tokens, attended[:, :, :group].reshape(num_seqs, -1, head_dim))

    def _make_plan(self, metadata: AttentionMetadata, q: torch.Tensor, group: int, max_keys: int) -> _Plan:
        """Sort the step's sequences into calls; a call of several sequences gathers at most `max_keys` keys."""
        plan = _Plan([], [])
        alike: dict[int, list[tuple[int, int]]] = {}  # padded number of keys -> (sequence, token) of each decode
        token = 0
        for seq, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            if query_len == 1 and group <= ROW_BLOCK:
                alike.setdefault(round_up(seq_len, self._key_quantum), []).append((seq, token))
            else:
                plan.chunks.append(self._plan_chunk(metadata, seq, token, group, row_quantum(q.shape[-1])))
            token += query_len
        for num_keys, members in alike.items():
            at_once = max(1, max_keys // num_keys)
            for first in range(0, len(members), at_once):
                plan.decodes.append(_plan_decodes(metadata, members[first : first + at_once], num_keys, q))
        return plan

    def _plan_chunk(
        self, metadata: AttentionMetadata, seq: int, first_token: int, group: int, row_quantum: int
    ) -> _Chunk:
        device, quantum = metadata.slot_mapping.device, self._key_quantum
        seq_len = metadata.seq_lens[seq]
        position = seq_len - metadata.query_lens[seq]
        shift = first_token - position  # from a position to its row of the flat batch
        segments = []
        while position < seq_len:
            num_keys = round_up(position + 1, quantum)
            end = min(seq_len, num_keys)
            num_rows = (end - position) * group
            rows_per_block = min(self._row_block, round_up(num_rows, row_quantum))
            rows = torch.arange(round_up(num_rows, rows_per_block), device=device)
            # Rows that only fill up a block stand at the last position, so that no row is without a key.
            positions = (position + rows // group).clamp_(max=end - 1)
            segments.append(_Segment(position + shift, end + shift, positions, num_keys, rows_per_block))
            position = end
        slots = _slots_of(metadata, [seq], round_up(seq_len, quantum))
        return _Chunk(slots.flatten(), segments)


def _plan_decodes(
    metadata: AttentionMetadata, members: list[tuple[int, int]], num_keys: int, q: torch.Tensor
) -> _Decodes:
    seqs = [seq for seq, _ in members]
    lengths = torch.tensor([metadata.seq_lens[seq] for seq in seqs], device=q.device)
    hidden = torch.arange(num_keys, device=q.device) >= lengths[:, None]  # (num_seqs, num_keys)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    tokens = torch.tensor([token for _, token in members], device=q.device)
    return _Decodes(tokens, _slots_of(metadata, seqs, num_keys).flatten(), mask[:, None, None], num_keys)


def _slots_of(metadata: AttentionMetadata, seqs: list[int], num_keys: int) -> torch.Tensor:
    """(len(seqs), num_keys) int64: the slot of each position of each sequence.

    Positions past a sequence's end read its first token again. Their scores are masked, but a masked weight of 0
    times a NaN is a NaN, and nothing is known of slots that nobody has written.
    """
    device = metadata.block_tables.device
    which = torch.tensor(seqs, device=device)
    lengths = torch.tensor([metadata.seq_lens[seq] for seq in seqs], device=device)
    positions = torch.arange(num_keys, device=device)
    positions = torch.where(positions < lengths[:, None], positions, 0)  # (num_seqs, num_keys)
    blocks = metadata.block_tables.index_select(0, which).gather(1, positions // metadata.block_size)
    return blocks * metadata.block_size + positions % metadata.block_size


def _run_segment(
    segment: _Segment,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from a segment's rows, cut into blocks along the batch axis of one call that share keys by stride 0."""
    num_tokens, head_dim, num_kv_heads = segment.end - segment.start, q.shape[-1], k.shape[1]
    num_rows, num_keys = num_tokens * group, segment.num_keys
    num_blocks = segment.positions.numel() // segment.rows_per_block
    rows = q[segment.start : segment.end].view(num_tokens, num_kv_heads, group, head_dim)
    rows = rows.transpose(0, 1).reshape(num_kv_heads, num_rows, head_dim)
    rows = F.pad(rows, (0, 0, 0, segment.positions.numel() - num_rows))
    rows = rows.view(num_kv_heads, num_blocks, -1, head_dim).transpose(0, 1)
    hidden = torch.arange(num_keys, device=q.device) > segment.positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    attended = _attend(
        rows,  # (num_blocks, num_kv_heads, rows_per_block, head_dim)
        k[:, :, :num_keys].expand(num_blocks, -1, -1, -1),
        v[:, :, :num_keys].expand(num_blocks, -1, -1, -1),
        mask.view(num_blocks, 1, -1, num_keys),
        scale,
    )
    attended = attended.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :num_rows]
    attended = attended.view(num_kv_heads, num_tokens, group, head_dim).transpose(0, 1)
    out[segment.start : segment.end] = attended.reshape(num_tokens, num_kv_heads * group, head_dim)


def _attend(rows: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Fused attention of (num_blocks, num_kv_heads, rows, head_dim) blocks; of a lone one together with its twin."""
    num_blocks = rows.shape[0]
    if num_blocks * rows.shape[1] == 1 and rows.device.type == "cpu":
        rows, k, v, mask = (tensor.expand(2, -1, -1, -1) for tensor in (rows, k, v, mask))
    return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)[:num_blocks]
