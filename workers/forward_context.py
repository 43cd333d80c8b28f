"""What an attention layer finds without being handed it: the batch's metadata and its own K/V blocks.

Ranks may run as threads of one process, so the current context belongs to the thread. This module knows neither
a model nor an attention backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator

import torch


@dataclasses.dataclass(slots=True)
class AttentionMetadata:
    """How the flat tokens of a step divide into sequences, and where their K/V lies.

    Attributes:
        query_lens: host list, tokens of each sequence in this step; their sum is num_tokens.
        seq_lens: host list, keys that each sequence attends to: its computed tokens plus this step's.
        slot_mapping: (num_tokens,) int64, where each token's K/V is stored: block * block_size + offset.
        block_tables: (num_seqs, max_blocks) int64, padded with block 0 behind a sequence's own blocks.
        block_size: tokens in a block.
        device_seq_lens: (num_seqs,) int64, `seq_lens` beside the other tensors, for kernels that read them there.
        plan: what the attention backend derived from the rest, in the step's first layer, for its other layers.
    """

    query_lens: list[int]
    seq_lens: list[int]
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    block_size: int
    device_seq_lens: torch.Tensor | None = None
    plan: object | None = None


@dataclasses.dataclass(slots=True)
class ForwardContext:
    """Metadata of the running forward pass and each layer's K/V cache (block is the first axis)."""

    metadata: AttentionMetadata
    kv_caches: list[torch.Tensor]


_local = threading.local()


@contextlib.contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Make `context` the current one of this thread; refuses nesting."""
    assert getattr(_local, "context", None) is None, "a forward pass is running in this thread already"
    _local.context = context
    try:
        yield
    finally:
        _local.context = None


def get_forward_context() -> ForwardContext:
    """The current context of this thread; only inside `forward_context`."""
    context: ForwardContext | None = getattr(_local, "context", None)
    assert context is not None, "attention ran outside a forward context"
    return context
