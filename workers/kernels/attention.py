"""Paged attention: one kernel for rows that decode, split over their keys, and one for chunks of prompts.

Both follow online softmax over tiles of keys (Dao 2023, FlashAttention-2; Dao and others 2023, Flash-Decoding). The
query heads that share a K/V head are computed together, so that a key is read once for all of them. The twin is
`workers.attention.torch_backend.TorchBackend`.

The cache is (num_blocks, 2, num_kv_heads, block_size, head_dim), a block contiguous: what a program reads of a block
is one piece of memory. Slots that hold no token may hold anything, NaN included, and are never read.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl

from workers.kernels import is_interpreted, next_power_of_2

_LOG2_E = 1.4426950408889634
# The least rows, and inner sizes, of a product in tensor cores.
_LEAST_DOT = 16
_MAX_SPLITS = 64
# They differ from step to step: Triton would compile a kernel anew for a 1 and for a multiple of 16, while requests
# wait. That a table's rows begin anywhere costs nothing, as its entries are read one by one.
_ANY_NUMBER = ("table_stride", "splits")


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if PRECISION == "widened":  # Triton's interpreter multiplies bfloat16 as if it were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc=acc)
    return tl.dot(a, b, acc=acc, input_precision=PRECISION)


@triton.jit
def _sequence_of(row, seq_lens, seqs, tokens, splits, KEYS: tl.constexpr, INDEXED: tl.constexpr):
    """Which sequence a row decodes and which token of the step it is, its number of keys, and of keys in a share."""
    seq = row
    token = row
    if INDEXED:
        seq = tl.load(seqs + row)
        token = tl.load(tokens + row)
    length = tl.load(seq_lens + seq).to(tl.int32)
    return seq, token, length, tl.cdiv(tl.cdiv(length, splits), KEYS) * KEYS


@triton.jit
def _meet_keys(
    q, last_position, acc, highest, weight, cache, table, first_key, end, scale,
    KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, block_stride, v_offset,
):  # fmt: skip
    """Take rows q (ROWS, DIM_BLOCK) through one tile of keys: positions first_key to first_key + KEYS.

    Masked, it stops at `end` and each row at its `last_position`; otherwise all rows see the whole tile.
    """
    position = first_key + tl.arange(0, KEYS)
    at = tl.arange(0, DIM_BLOCK)
    if MASKED:
        block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0)
    else:
        block = tl.load(table + position // BLOCK_SIZE)
    slot = block.to(tl.int64) * block_stride + (position % BLOCK_SIZE) * HEAD_DIM
    keys = cache + slot[None, :] + at[:, None]  # (DIM_BLOCK, KEYS)
    values = cache + v_offset + slot[:, None] + at[None, :]  # (KEYS, DIM_BLOCK)
    if MASKED:
        present = position < end
        k = tl.load(keys, mask=present[None, :] & (at < HEAD_DIM)[:, None], other=0.0)
    elif DIM_BLOCK != HEAD_DIM:
        k = tl.load(keys, mask=(at < HEAD_DIM)[:, None], other=0.0)
    else:
        k = tl.load(keys)
    scores = _dot(q, k, None, PRECISION) * scale  # (ROWS, KEYS), in powers of two
    if MASKED:
        scores = tl.where(position[None, :] <= last_position[:, None], scores, -float("inf"))
    now_highest = tl.maximum(highest, tl.max(scores, axis=1))
    shrink = tl.exp2(highest - now_highest)
    p = tl.exp2(scores - now_highest[:, None])
    if MASKED:
        v = tl.load(values, mask=present[:, None] & (at < HEAD_DIM)[None, :], other=0.0)
    elif DIM_BLOCK != HEAD_DIM:
        v = tl.load(values, mask=(at < HEAD_DIM)[None, :], other=0.0)
    else:
        v = tl.load(values)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    return acc, now_highest, weight * shrink + tl.sum(p, axis=1)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _decode(
    q, cache, tables, seq_lens, seqs, tokens, out, part_out, part_scale, scale,
    splits, table_stride, block_stride, v_offset, head_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, IS_SPLIT: tl.constexpr, INDEXED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of a K/V head of a sequence, over one of `splits` shares of its keys."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq, token, length, share = _sequence_of(row, seq_lens, seqs, tokens, splits, KEYS, INDEXED)
    start = split * share
    end = tl.minimum(start + share, length)
    member = tl.arange(0, ROWS)
    at = tl.arange(0, DIM_BLOCK)
    stored = (member < GROUP)[:, None] & (at < HEAD_DIM)[None, :]
    head = kv_head * GROUP + member
    heads = (token * NUM_HEADS + head[:, None]) * HEAD_DIM + at[None, :]
    if start < end or not IS_SPLIT:
        rows = tl.load(q + heads, mask=stored, other=0.0)
        acc = tl.zeros((ROWS, DIM_BLOCK), dtype=tl.float32)
        highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
        weight = tl.zeros((ROWS,), dtype=tl.float32)
        table = tables + seq * table_stride
        last_position = tl.zeros((ROWS,), dtype=tl.int32) + (length - 1)
        base = cache + kv_head * head_stride
        whole = start + (end - start) // KEYS * KEYS
        for first_key in range(start, whole, KEYS):
            acc, highest, weight = _meet_keys(
                rows, last_position, acc, highest, weight, base, table, first_key, end, scale,
                KEYS, BLOCK_SIZE, HEAD_DIM, DIM_BLOCK, False, PRECISION, block_stride, v_offset,
            )  # fmt: skip
        if whole < end:
            acc, highest, weight = _meet_keys(
                rows, last_position, acc, highest, weight, base, table, whole, end, scale,
                KEYS, BLOCK_SIZE, HEAD_DIM, DIM_BLOCK, True, PRECISION, block_stride, v_offset,
            )  # fmt: skip
        # A row without keys (padding of a captured graph) is 0, not NaN.
        acc = acc / tl.where(weight > 0, weight, 1.0)[:, None]
        if not IS_SPLIT:
            tl.store(out + heads, acc.to(out.dtype.element_ty), mask=stored)
        else:
            part = (row * NUM_HEADS + head) * splits + split
            tl.store(part_out + part[:, None] * HEAD_DIM + at[None, :], acc, mask=stored)
            tl.store(part_scale + part, highest + tl.log2(weight), mask=member < GROUP)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _merge_splits(
    part_out, part_scale, seq_lens, seqs, tokens, out, splits,
    NUM_HEADS: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr,
    SPLITS_BLOCK: tl.constexpr, INDEXED: tl.constexpr,
):  # fmt: skip
    """One program: one query head of a sequence. Shares that had no keys were not written, and are not read."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    _, token, length, share = _sequence_of(row, seq_lens, seqs, tokens, splits, KEYS, INDEXED)
    split = tl.arange(0, SPLITS_BLOCK)
    at = tl.arange(0, DIM_BLOCK)
    written = (split < splits) & (split * share < length)
    part = (row * NUM_HEADS + head) * splits + split
    scale = tl.load(part_scale + part, mask=written, other=-float("inf"))
    highest = tl.maximum(tl.max(scale, axis=0), -1e30)  # finite even where there are no keys
    factor = tl.exp2(scale - highest)
    parts = tl.load(
        part_out + part[:, None] * HEAD_DIM + at[None, :],
        mask=written[:, None] & (at < HEAD_DIM)[None, :],
        other=0.0,
    )  # (SPLITS_BLOCK, DIM_BLOCK)
    total = tl.sum(factor, axis=0)
    merged = tl.sum(parts * factor[:, None], axis=0) / tl.where(total > 0, total, 1.0)
    target = out + (token * NUM_HEADS + head) * HEAD_DIM + at
    tl.store(target, merged.to(out.dtype.element_ty), mask=at < HEAD_DIM)


@triton.jit(do_not_specialize=_ANY_NUMBER)
def _prefill(
    q, cache, tables, tiles, out, scale, table_stride, block_stride, v_offset, head_stride,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: some consecutive tokens of a sequence, in the query heads of one K/V head."""
    tile = tiles + tl.program_id(0).to(tl.int64) * 4
    kv_head = tl.program_id(1)
    seq = tl.load(tile)
    first_token = tl.load(tile + 1)
    first_position = tl.load(tile + 2).to(tl.int32)
    num_tokens = tl.load(tile + 3).to(tl.int32)
    member = tl.arange(0, ROWS)
    at = tl.arange(0, DIM_BLOCK)
    offset = member // GROUP
    heads = (first_token + offset) * NUM_HEADS + kv_head * GROUP + member % GROUP
    pointers = heads[:, None] * HEAD_DIM + at[None, :]
    stored = (offset < num_tokens)[:, None] & (at < HEAD_DIM)[None, :]
    rows = tl.load(q + pointers, mask=stored, other=0.0)
    # Rows that only fill up the tile stand where the last token does, so that no row is without a key.
    last_position = first_position + tl.minimum(offset, num_tokens - 1)
    acc = tl.zeros((ROWS, DIM_BLOCK), dtype=tl.float32)
    highest = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    weight = tl.zeros((ROWS,), dtype=tl.float32)
    table = tables + seq * table_stride
    base = cache + kv_head * head_stride
    end = first_position + num_tokens
    seen_by_all = (first_position + 1) // KEYS * KEYS
    for first_key in range(0, seen_by_all, KEYS):
        acc, highest, weight = _meet_keys(
            rows, last_position, acc, highest, weight, base, table, first_key, end, scale,
            KEYS, BLOCK_SIZE, HEAD_DIM, DIM_BLOCK, False, PRECISION, block_stride, v_offset,
        )  # fmt: skip
    for first_key in range(seen_by_all, end, KEYS):
        acc, highest, weight = _meet_keys(
            rows, last_position, acc, highest, weight, base, table, first_key, end, scale,
            KEYS, BLOCK_SIZE, HEAD_DIM, DIM_BLOCK, True, PRECISION, block_stride, v_offset,
        )  # fmt: skip
    acc = acc / weight[:, None]
    tl.store(out + pointers, acc.to(out.dtype.element_ty), mask=stored)


# ------------------------------------------------------------------------------------------------- launchers


@dataclasses.dataclass(frozen=True)
class TileShape:
    """Sizes that a kernel is compiled for; to be tuned on a device, never a matter of what comes out.

    Attributes:
        rows: (token, query head) pairs of a program.
        keys: positions of a step of its loop.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def decode_shape(group: int, head_dim: int, itemsize: int) -> TileShape:
    """How rows that decode are computed: several programs share a processor, so that some load while others compute."""
    rows = max(_LEAST_DOT, next_power_of_2(group))
    if itemsize == 4:  # no tensor cores: operands lie in registers
        return TileShape(rows, _LEAST_DOT, num_warps=8, num_stages=2)
    return TileShape(rows, 64 if head_dim <= 128 else 32, num_warps=4, num_stages=3)


def prefill_shape(group: int, head_dim: int, itemsize: int) -> TileShape:
    """How chunks are computed. At least one token of every query head must fit."""
    least = next_power_of_2(group)
    if itemsize == 4:
        return TileShape(max(32, least), _LEAST_DOT, num_warps=8, num_stages=2)
    if head_dim <= 128:
        return TileShape(max(128, least), 64, num_warps=8, num_stages=2)
    return TileShape(max(64, least), 32, num_warps=4, num_stages=2)


def num_splits(num_rows: int, num_kv_heads: int, max_seq_len: int, num_processors: int) -> int:
    """Into how many shares the keys of rows that decode are cut: enough to keep every processor busy.

    Args:
        num_rows: that decode in this step.
        max_seq_len: no row has more keys.
        num_processors: streaming multiprocessors of the device.
    """
    wanted = 4 * num_processors // (num_rows * num_kv_heads)
    # A share below 128 keys costs more to merge than it saves.
    return max(1, min(wanted, -(-max_seq_len // 128), _MAX_SPLITS))


def decode_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    splits: int,
    out: torch.Tensor,
    which: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attend from one token of each sequence to all its keys.

    Args:
        q: (num_tokens, num_heads, head_dim), contiguous.
        cache: (num_blocks, 2, num_kv_heads, block_size, head_dim).
        block_tables: (num_seqs, max_blocks) int64.
        seq_lens: (num_seqs,) int64, keys of each sequence; a row of length 0 gets zeros.
        scale: what scores are multiplied by before the softmax.
        splits: into how many shares the keys are cut, at most 64.
        out: like `q`; only the rows that are computed are written.
        which: (num_rows,) int64 sequences, and their tokens; None when token i is that of sequence i, for all.
    """
    num_heads, head_dim = q.shape[1:]
    _, _, num_kv_heads, block_size, _ = cache.shape
    group = num_heads // num_kv_heads
    num_rows = len(seq_lens) if which is None else len(which[0])
    seqs, tokens = (seq_lens, seq_lens) if which is None else which
    shape = decode_shape(group, head_dim, q.element_size())
    part_out = part_scale = out
    if splits > 1:
        part_out = torch.empty((num_rows, num_heads, splits, head_dim), dtype=torch.float32, device=q.device)
        part_scale = torch.empty((num_rows, num_heads, splits), dtype=torch.float32, device=q.device)
    assert splits <= _MAX_SPLITS, f"{splits} splits"
    assert q.is_contiguous(), "q must be contiguous"
    assert out.is_contiguous(), "out must be contiguous"
    _decode[(num_rows, num_kv_heads, splits)](
        q, cache, block_tables, seq_lens, seqs, tokens, out, part_out, part_scale, scale * _LOG2_E,
        splits, block_tables.stride(0), cache.stride(0), cache.stride(1), cache.stride(2),
        NUM_HEADS=num_heads, GROUP=group, ROWS=shape.rows, KEYS=shape.keys, BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim, DIM_BLOCK=max(_LEAST_DOT, next_power_of_2(head_dim)), IS_SPLIT=splits > 1,
        INDEXED=which is not None, PRECISION=_precision(q.dtype),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    if splits > 1:
        _merge_splits[(num_rows, num_heads)](
            part_out, part_scale, seq_lens, seqs, tokens, out, splits,
            NUM_HEADS=num_heads, KEYS=shape.keys, HEAD_DIM=head_dim, DIM_BLOCK=next_power_of_2(head_dim),
            SPLITS_BLOCK=_MAX_SPLITS, INDEXED=which is not None, num_warps=4,
        )  # fmt: skip


def plan_tiles(chunks: list[tuple[int, int, int, int]], group: int, head_dim: int, itemsize: int) -> list[int]:
    """Cut chunks into the tiles that `prefill_attention` takes, those with the most keys first.

    Args:
        chunks: (sequence, first token in the batch, position of that token, number of tokens) of each.

    Returns:
        The same four numbers of each tile, one after another.
    """
    size = prefill_shape(group, head_dim, itemsize).rows // group
    tiles = [
        (seq, token + first, position + first, min(size, count - first))
        for seq, token, position, count in chunks
        for first in range(0, count, size)
    ]
    # The last ones to start have the least to do, so that no processor is alone for long at the end.
    tiles.sort(key=lambda tile: -tile[2])
    return [number for tile in tiles for number in tile]


def prefill_attention(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attend from the tokens of some chunks to all keys up to their own position.

    Args:
        q: (num_tokens, num_heads, head_dim), contiguous.
        cache: (num_blocks, 2, num_kv_heads, block_size, head_dim).
        block_tables: (num_seqs, max_blocks) int64.
        tiles: (4 * num_tiles,) int64, of `plan_tiles`.
        scale: what scores are multiplied by before the softmax.
        out: like `q`; only the tokens of the chunks are written.
    """
    num_heads, head_dim = q.shape[1:]
    _, _, num_kv_heads, block_size, _ = cache.shape
    group = num_heads // num_kv_heads
    shape = prefill_shape(group, head_dim, q.element_size())
    assert q.is_contiguous(), "q must be contiguous"
    assert out.is_contiguous(), "out must be contiguous"
    _prefill[(len(tiles) // 4, num_kv_heads)](
        q, cache, block_tables, tiles, out, scale * _LOG2_E,
        block_tables.stride(0), cache.stride(0), cache.stride(1), cache.stride(2),
        NUM_HEADS=num_heads, GROUP=group, ROWS=shape.rows, KEYS=shape.keys, BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim, DIM_BLOCK=max(_LEAST_DOT, next_power_of_2(head_dim)), PRECISION=_precision(q.dtype),
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def _precision(dtype: torch.dtype) -> str:
    """Products of float32 are exact float32 products; Triton's default would round them to 10 bits."""
    if dtype == torch.bfloat16 and is_interpreted():
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"
