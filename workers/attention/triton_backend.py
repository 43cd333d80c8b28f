"""Paged attention by Triton kernels, for GPUs; under Triton's interpreter it runs on a CPU, for tests.

It knows no model and no scheduler. Rows that decode go to one kernel and chunks of prompts to another; a step of
decodes alone needs nothing of the host but its shape, so that a CUDA graph may hold it.
"""

from __future__ import annotations

import dataclasses

import torch

from configs.errors import ConfigError
from workers.attention.base import AttentionBackend
from workers.forward_context import AttentionMetadata
from workers.kernels import activation, attention, is_interpreted, norm, rotary_store
from workers.staging import send

# What num_splits counts on under the interpreter, so that some cases are split.
_INTERPRETED_PROCESSORS = 4


@dataclasses.dataclass(slots=True)
class _Plan:
    """What every layer of a step repeats; made by the first.

    Attributes:
        seq_lens: (num_seqs,) int64.
        splits: into how many shares the keys of rows that decode are cut; 0 when there are no such rows.
        which: their sequences and tokens, each (num_rows,) int64; None when they are all there is.
        tiles: (4 * num_tiles,) int64, of the chunks; None when there are none.
    """

    seq_lens: torch.Tensor
    splits: int
    which: tuple[torch.Tensor, torch.Tensor] | None
    tiles: torch.Tensor | None


class TritonBackend(AttentionBackend):
    """Attention, and with it the other kernels of a layer, in Triton.

    Raises:
        ConfigError: the device is no GPU, and Triton's interpreter is not switched on.
    """

    uses_triton = True
    capturable = True

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        elif is_interpreted():
            self._num_processors = _INTERPRETED_PROCESSORS
        else:
            raise ConfigError(
                f"attention_backend triton needs a GPU, the device is {device}; use attention_backend=torch "
                "(or set TRITON_INTERPRET=1 to debug the kernels, slowly)",
                "attention_backend",
            )

    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """(num_blocks, 2, num_kv_heads, block_size, head_dim): a head's keys of a block are one piece of memory."""
        return (num_blocks, 2, num_kv_heads, block_size, head_dim)

    def store(self, cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """See `AttentionBackend.store`. Plain torch: the model's way is `rotate_and_store`."""
        stored = slot_mapping >= 0
        slots = slot_mapping[stored]
        blocks, offsets = slots // cache.shape[3], slots % cache.shape[3]
        cache[blocks, 0, :, offsets] = k[stored]
        cache[blocks, 1, :, offsets] = v[stored]

    def rotate_and_store(
        self,
        cache: torch.Tensor,
        qkv: torch.Tensor,
        num_heads: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        head_norm: tuple[torch.Tensor, float] | None,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """See `AttentionBackend.rotate_and_store`."""
        weight, eps = (None, 0.0) if head_norm is None else head_norm
        return rotary_store.rotate_and_store(qkv, num_heads, *angles, weight, eps, cache, slot_mapping)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `AttentionBackend.add_rms_norm`."""
        return norm.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `AttentionBackend.silu_and_mul`."""
        return activation.silu_and_mul(gate_up)

    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """See `AttentionBackend.forward`."""
        if not isinstance(metadata.plan, _Plan):
            metadata.plan = self._make_plan(metadata, q, cache.shape[2])
        plan = metadata.plan
        q = q.contiguous()
        out = torch.empty_like(q)  # (num_tokens, num_heads, head_dim)
        tables = metadata.block_tables
        if plan.splits:
            attention.decode_attention(q, cache, tables, plan.seq_lens, scale, plan.splits, out, plan.which)
        if plan.tiles is not None:
            attention.prefill_attention(q, cache, tables, plan.tiles, scale, out)
        return out

    def _make_plan(self, metadata: AttentionMetadata, q: torch.Tensor, num_kv_heads: int) -> _Plan:
        """Tell decodes from chunks. What the kernels need of the host goes there in one transfer, without a wait."""
        group, head_dim = q.shape[1] // num_kv_heads, q.shape[2]
        decodes: list[int] = []
        tokens: list[int] = []
        chunks: list[tuple[int, int, int, int]] = []
        token, longest = 0, 1
        for seq, (query_len, seq_len) in enumerate(zip(metadata.query_lens, metadata.seq_lens, strict=True)):
            if query_len == 1:
                decodes.append(seq)
                tokens.append(token)
                longest = max(longest, seq_len)
            else:
                chunks.append((seq, token, seq_len - query_len, query_len))
            token += query_len
        seq_lens = metadata.device_seq_lens
        if seq_lens is None:
            seq_lens = send(metadata.seq_lens, q.device)
        splits = 0
        if decodes:
            splits = attention.num_splits(len(decodes), num_kv_heads, longest, self._num_processors)
        if not chunks:
            return _Plan(seq_lens, splits, None, None)
        tiles = attention.plan_tiles(chunks, group, head_dim, q.element_size())
        # An even number of them, so that each list begins at 16 bytes: kernels are compiled anew for other places.
        filling = [0] * (len(decodes) % 2)
        sent = send(decodes + filling + tokens + filling + tiles, q.device)
        num_rows, second = len(decodes), len(decodes + filling)
        which = (sent[:num_rows], sent[second : second + num_rows]) if decodes else None
        return _Plan(seq_lens, splits, which, sent[2 * second :])
