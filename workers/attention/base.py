"""What an attention backend is: a cache layout, a way to fill it and a way to attend over it.

A backend may also bring kernels of its own for what stands around attention in a layer; here are the plain ones. It
knows no model and no scheduler; a step's shape comes as `AttentionMetadata`.
"""

from __future__ import annotations

import abc

import torch

from workers.forward_context import AttentionMetadata
from workers.layers import activation, norm
from workers.layers.rotary import rotate


class AttentionBackend(abc.ABC):
    """One implementation of paged attention. Stateless between steps; every layer of a rank shares one.

    Attributes:
        uses_triton: whether Triton kernels compute what stands around attention; the sampler then takes one, too.
        capturable: whether a CUDA graph may hold a step of decodes: nothing in it waits for the device or depends on
            numbers of the host but the batch's shape and the bound on `seq_lens`.
    """

    uses_triton = False
    capturable = False

    def check(self, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
        """Told once, before weights are read, what it will have to compute with.

        Args:
            block_size: tokens in a K/V block.
            head_dim: size of a head.
            dtype: of queries, K and V.

        Raises:
            ConfigError: it cannot.
        """
        return

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

    def rotate_and_store(
        self,
        cache: torch.Tensor,
        qkv: torch.Tensor,
        num_heads: int,
        angles: tuple[torch.Tensor, torch.Tensor],
        head_norm: tuple[torch.Tensor, float] | None,
        slot_mapping: torch.Tensor,
    ) -> torch.Tensor:
        """Normalise and rotate q and k, and `store` k and v.

        Args:
            cache: of `kv_cache_shape`.
            qkv: (num_tokens, num_heads + 2 * num_kv_heads, head_dim), heads of q, k and v in this order.
            num_heads: of q.
            angles: cosines and sines of the tokens' positions, each (num_tokens, 1, head_dim / 2) float32.
            head_norm: weights, (num_heads + num_kv_heads, head_dim), and eps of the RMSNorm of each head of q and k;
                None where there is none.
            slot_mapping: as in `store`.

        Returns:
            (num_tokens, num_heads, head_dim), the q that `forward` takes.
        """
        num_rotated = (qkv.shape[1] + num_heads) // 2  # heads of q and k
        qk, v = qkv[:, :num_rotated], qkv[:, num_rotated:]
        if head_norm is not None:
            qk = norm.rms_norm(qk, *head_norm)
        qk = rotate(qk, *angles)
        self.store(cache, qk[:, num_heads:], v, slot_mapping)
        return qk[:, :num_heads]

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `workers.layers.norm.add_rms_norm`."""
        return norm.add_rms_norm(x, residual, weight, eps)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `workers.layers.activation.silu_and_mul`."""
        return activation.silu_and_mul(gate_up)

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
