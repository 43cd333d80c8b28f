"""The attention layer as a decoder sees it: store this step's K/V, then attend over the paged cache.

It knows neither how the batch divides into sequences nor how attention is computed: both are the backend's, which
finds them in the forward context.
"""

from __future__ import annotations

import torch
from torch import nn

from workers.attention.base import AttentionBackend
from workers.forward_context import get_forward_context


class Attention(nn.Module):
    """Causal grouped-query attention of one layer, over this rank's share of the heads.

    Args:
        layer_index: which of the forward context's caches is this layer's.
        num_heads: query heads of this rank.
        num_kv_heads: K/V heads of this rank; divides `num_heads`.
        head_dim: size of a head, of K and V alike.
        scale: what scores are multiplied by before the softmax, usually head_dim ** -0.5.
        backend: how it is computed.
    """

    def __init__(
        self,
        layer_index: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        backend: AttentionBackend,
    ) -> None:
        super().__init__()
        assert num_heads % num_kv_heads == 0, f"{num_heads} query heads over {num_kv_heads} K/V heads"
        self.layer_index = layer_index
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.backend = backend

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from the step's tokens to all that came before them and to themselves.

        Args:
            q: (num_tokens, num_heads, head_dim), rotated.
            k: (num_tokens, num_kv_heads, head_dim), rotated.
            v: (num_tokens, num_kv_heads, head_dim).

        Returns:
            (num_tokens, num_heads, head_dim), dtype of `q`.
        """
        context = get_forward_context()
        cache = context.kv_caches[self.layer_index]
        self.backend.store(cache, k, v, context.metadata.slot_mapping)
        return self.backend.forward(q, cache, context.metadata, self.scale)

    def forward_projected(
        self,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        head_norm: tuple[torch.Tensor, float] | None,
    ) -> torch.Tensor:
        """Like `forward`, from what the projection gave: norms and rotation come first, in the backend's way.

        Args:
            qkv: (num_tokens, num_heads + 2 * num_kv_heads, head_dim), heads of q, k and v in this order.
            angles, head_norm: as in `AttentionBackend.rotate_and_store`.

        Returns:
            (num_tokens, num_heads, head_dim), dtype of `qkv`.
        """
        context = get_forward_context()
        cache, slots = context.kv_caches[self.layer_index], context.metadata.slot_mapping
        q = self.backend.rotate_and_store(cache, qkv, self.num_heads, angles, head_norm, slots)
        return self.backend.forward(q, cache, context.metadata, self.scale)
