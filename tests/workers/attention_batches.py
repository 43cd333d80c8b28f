"""Random mixed batches over a paged cache, for the attention tests; knows no expected result."""

from __future__ import annotations

import dataclasses
import random

import torch

from workers.attention.base import AttentionBackend
from workers.attention.torch_backend import TorchBackend
from workers.forward_context import AttentionMetadata


@dataclasses.dataclass
class Sequences:
    """Queries, keys and values of every position of some sequences, and a cache that holds the keys and values.

    Attributes:
        q: one (length, num_heads, head_dim) a sequence; k and v with num_kv_heads.
        cache: shuffled blocks; NaN wherever no token was stored, block 0 included.
    """

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    tables: list[list[int]]
    cache: torch.Tensor
    block_size: int
    scale: float
    backend: AttentionBackend

    @classmethod
    def make(
        cls,
        lengths: list[int],
        num_kv_heads: int = 2,
        group: int = 2,
        head_dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        backend: AttentionBackend | None = None,
    ) -> Sequences:
        backend = backend or TorchBackend(torch.device("cpu"))
        generator = torch.Generator().manual_seed(seed)

        def normal(length: int, heads: int) -> torch.Tensor:
            return torch.randn(length, heads, head_dim, generator=generator).to(dtype)

        needed = [-(-length // block_size) for length in lengths]
        blocks = list(range(1, sum(needed) + 1))
        random.Random(seed).shuffle(blocks)
        tables = [[blocks.pop() for _ in range(count)] for count in needed]
        shape = backend.kv_cache_shape(sum(needed) + 1, block_size, num_kv_heads, head_dim)
        made = cls(
            q=[normal(length, num_kv_heads * group) for length in lengths],
            k=[normal(length, num_kv_heads) for length in lengths],
            v=[normal(length, num_kv_heads) for length in lengths],
            tables=tables,
            cache=torch.full(shape, torch.nan, dtype=dtype),
            block_size=block_size,
            scale=head_dim**-0.5,
            backend=backend,
        )
        for k, v, table in zip(made.k, made.v, tables, strict=True):
            backend.store(made.cache, k, v, slots(table, 0, len(k), block_size))
        return made

    def metadata(self, chunks: list[tuple[int, int, int]]) -> AttentionMetadata:
        """Of a step that computes positions first..end of each (sequence, first, end)."""
        width = max(-(-end // self.block_size) for _, _, end in chunks)
        tables = [(self.tables[seq][: -(-end // self.block_size)] + [0] * width)[:width] for seq, _, end in chunks]
        device = self.cache.device
        return AttentionMetadata(
            query_lens=[end - first for _, first, end in chunks],
            seq_lens=[end for _, _, end in chunks],
            slot_mapping=torch.cat(
                [slots(self.tables[seq], first, end, self.block_size) for seq, first, end in chunks]
            ).to(device),
            block_tables=torch.tensor(tables, device=device),
            block_size=self.block_size,
            device_seq_lens=torch.tensor([end for _, _, end in chunks], device=device),
        )

    def attend(self, chunks: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """Run the backend on one step; (end - first, num_heads, head_dim) of each chunk."""
        q = torch.cat([self.q[seq][first:end] for seq, first, end in chunks])
        out = self.backend.forward(q, self.cache, self.metadata(chunks), self.scale)
        return list(out.split([end - first for _, first, end in chunks]))

    def reference(self, seq: int, first: int, end: int) -> torch.Tensor:
        """Dense attention in float64, on the CPU, written as plainly as it can be."""
        q, k, v = (tensor[seq][:end].cpu().double() for tensor in (self.q, self.k, self.v))
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:], k) * self.scale
        future = torch.arange(end) > torch.arange(first, end)[:, None]
        weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


def slots(table: list[int], first: int, end: int, block_size: int) -> torch.Tensor:
    """(end - first,) int64 slots of these positions."""
    return torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(first, end)])


def random_chunks(lengths: list[int], rng: random.Random) -> list[tuple[int, int, int]]:
    """One (sequence, first, end) a sequence: a decode, a middle chunk, a last chunk or the whole, in random order."""
    chunks = []
    for seq, length in enumerate(lengths):
        end = rng.randint(1, length)
        first = rng.choice([end - 1, 0, rng.randrange(end), max(0, end - rng.randint(1, 9))])
        chunks.append((seq, first, end))
    rng.shuffle(chunks)
    return chunks
