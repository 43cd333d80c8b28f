"""What an attention backend is: a cache layout, a way to fill it and a way to attend over it.

It knows no model and no scheduler; a step's shape comes as `AttentionMetadata`.
"""

from __future__ import annotations

import abc

import torch

from workers.forward_context import AttentionMetadata


class AttentionBackend(abc.ABC):
    """One implementation of paged attention. Stateless between steps; every layer of a rank shares one."""

    @abc.abstractmethod
    def kv_cache_shape(self, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int) -> tuple[int, ...]:
        """Shape of one layer's cache, K and V together. The block is the first axis of every backend's layout."""

    @abc.abstractmethod
    def store(self, cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Write K and V of the step's tokens into their slots.

        Args:
            cache: of `kv_cache_shape`.
            k: (num_tokens, num_kv_heads, head_dim).
            v: (num_tokens, num_kv_heads, head_dim).
            slot_mapping: (num_tokens,) int64, block * block_size + offset.
        """

    @abc.abstractmethod
    def forward(self, q: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float) -> torch.Tensor:
        """Causal attention of each token over its sequence's keys, which `store` has put into the cache.

        Args:
            q: (num_tokens, num_heads, head_dim).
            cache: of `kv_cache_shape`; slots past a sequence's length may hold anything, NaN included.
            metadata: how the tokens divide into sequences.
            scale: what scores are multiplied by before the softmax.

        Returns:
            (num_tokens, num_heads, head_dim), dtype of `q`.
        """
