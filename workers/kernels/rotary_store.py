"""Per-head norms, rotation of q and k, and the store of k and v, in one pass over a projection's output.

The twin is `workers.attention.base.AttentionBackend.rotate_and_store`. Of the cache it knows the layout alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from workers.kernels import next_power_of_2

_HEADS_PER_PROGRAM = 8


@triton.jit
def _rotate_and_store(
    qkv, q_out, cache, cos, sin, norm, slots, eps,
    qkv_stride, angle_stride, block_stride, v_offset, head_stride,
    BLOCK_SIZE: tl.constexpr, NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    # One program takes HEADS heads of a token, as two halves of which pairs are rotated against each other. The heads
    # of q, k and v go the same way, and what is not theirs is masked: nothing here costs as much as the memory.
    HEAD_DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = tl.arange(0, HALF_BLOCK)
    in_half = at < HALF
    inside = (head < NUM_HEADS + 2 * NUM_KV_HEADS)[:, None] & in_half[None, :]
    source = qkv + token * qkv_stride + head[:, None] * HEAD_DIM + at[None, :]
    first = tl.load(source, mask=inside, other=0.0)  # (HEADS, HALF_BLOCK)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    dtype = first.dtype
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    rotated = (head < NUM_HEADS + NUM_KV_HEADS)[:, None]
    if HAS_NORM:
        squares = tl.sum(wide_first * wide_first, axis=1) + tl.sum(wide_second * wide_second, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        factors = norm + head[:, None] * HEAD_DIM + at[None, :]
        normed = rotated & in_half[None, :]
        factor = tl.load(factors, mask=normed, other=0.0).to(tl.float32)
        wide_first = ((wide_first * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
        factor = tl.load(factors + HALF, mask=normed, other=0.0).to(tl.float32)
        wide_second = ((wide_second * scale).to(dtype).to(tl.float32) * factor).to(dtype).to(tl.float32)
    c = tl.load(cos + token * angle_stride + at, mask=in_half, other=0.0)[None, :]
    s = tl.load(sin + token * angle_stride + at, mask=in_half, other=0.0)[None, :]
    first = tl.where(rotated, (wide_first * c - wide_second * s).to(dtype), first)
    second = tl.where(rotated, (wide_second * c + wide_first * s).to(dtype), second)

    target = q_out + token * NUM_HEADS * HEAD_DIM + head[:, None] * HEAD_DIM + at[None, :]
    is_q = inside & (head < NUM_HEADS)[:, None]
    tl.store(target, first, mask=is_q)
    tl.store(target + HALF, second, mask=is_q)

    slot = tl.load(slots + token)
    kv_head = head - NUM_HEADS
    is_v = (kv_head >= NUM_KV_HEADS).to(tl.int32)
    target = cache + (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * HEAD_DIM
    target = target + (is_v * v_offset + (kv_head - is_v * NUM_KV_HEADS) * head_stride)[:, None] + at[None, :]
    end = tl.where(slot >= 0, NUM_HEADS + 2 * NUM_KV_HEADS, 0)
    is_kv = ((head >= NUM_HEADS) & (head < end))[:, None] & in_half[None, :]
    tl.store(target, first, mask=is_kv)
    tl.store(target + HALF, second, mask=is_kv)


def rotate_and_store(
    qkv: torch.Tensor,
    num_heads: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
    cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    """Normalise and rotate q and k, put k and v into their slots, and return q.

    Args:
        qkv: (num_tokens, num_heads + 2 * num_kv_heads, head_dim), heads of q, k and v in this order.
        num_heads: of q.
        cos, sin: (num_tokens, 1, head_dim / 2) float32.
        norm: (num_heads + num_kv_heads, head_dim), weights of the heads' norms; None where there are none.
        eps: of the norms.
        cache: (num_blocks, 2, num_kv_heads, block_size, head_dim), of which a block is contiguous.
        slot_mapping: (num_tokens,) int64; a negative slot is nowhere.

    Returns:
        (num_tokens, num_heads, head_dim).
    """
    num_tokens, all_heads, head_dim = qkv.shape
    _, _, num_kv_heads, block_size, _ = cache.shape
    assert (all_heads, head_dim) == (num_heads + 2 * num_kv_heads, cache.shape[-1]), f"{qkv.shape}, {cache.shape}"
    assert qkv.stride()[1:] == cache.stride()[3:] == (head_dim, 1), "heads must be contiguous"
    assert cos.stride() == sin.stride(), "cos and sin must lie alike"
    assert cos.stride(2) == 1, "angles of a token must be contiguous"
    assert norm is None or norm.is_contiguous(), "norms must be contiguous"
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens:
        heads = min(_HEADS_PER_PROGRAM, next_power_of_2(all_heads))
        _rotate_and_store[(num_tokens, triton.cdiv(all_heads, heads))](
            qkv, q, cache, cos, sin, q if norm is None else norm, slot_mapping, eps,
            qkv.stride(0), cos.stride(0), cache.stride(0), cache.stride(1), cache.stride(2),
            BLOCK_SIZE=block_size, NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HALF=head_dim // 2,
            HALF_BLOCK=next_power_of_2(head_dim // 2), HEADS=heads, HAS_NORM=norm is not None, num_warps=4,
        )  # fmt: skip
    return q
