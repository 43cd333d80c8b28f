"""How the sequences of one request share their prompt: which computes it, and where the others start.

The first sequence to run computes the prompt up to its last token. With that one token left the others fork: they
share its blocks, copy the last one if it is partly filled, and compute the last prompt token themselves, so each is
sampled as any other sequence is. One that finds no room then waits, and forks from whichever sibling runs when there
is some; without any it starts on its own, like a sequence alone. This module decides and changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from nanoengine.block_manager import BlockManager
from nanoengine.sequence import Sequence, SequenceStatus


class Start(NamedTuple):
    """What a waiting sequence need not compute: its first `num_tokens`, from a `parent` to fork or from prefix hits."""

    num_tokens: int
    hits: list[int]
    parent: Sequence | None = None

    def num_new_blocks(self, seq: Sequence, blocks: BlockManager) -> int:
        """How many blocks `seq` needs beside the hits, or beside the full ones of its parent."""
        return blocks.blocks_for(seq.num_tokens) - (len(self.hits) or self.num_tokens // blocks.block_size)


def find_start(seq: Sequence, blocks: BlockManager) -> Start | None:
    """Where the waiting `seq` starts; None when a running sequence is computing just now what it needs."""
    if seq.status is SequenceStatus.SWAPPED:
        return Start(seq.num_computed_tokens, blocks.match_prefix(seq))
    num_shared = _num_shared(seq)
    # One that is to tell of its prompt takes over no position whose logits are still wanted.
    parent = _sibling(seq) if num_shared <= seq.num_hittable_tokens else None
    # Without tokens of its own no prefix hit is longer than what it shares with its siblings.
    hits = [] if parent is not None and not seq.num_completion_tokens else blocks.match_prefix(seq)
    num_hit_tokens = len(hits) * blocks.block_size
    if parent is None or num_hit_tokens > num_shared:
        return None if blocks.is_coming(seq, len(hits)) else Start(num_hit_tokens, hits)
    return Start(num_shared, [], parent) if parent.num_computed_tokens >= num_shared else None


def chunk_before_fork(seq: Sequence, num_tokens: int) -> int:
    """How many of its next `num_tokens` tokens `seq` may compute before the siblings that wait for it fork."""
    left = _num_shared(seq) - seq.num_computed_tokens
    if 0 < left < num_tokens and any(each.status is SequenceStatus.WAITING for each in seq.request.seqs):
        return left
    return num_tokens


def after_siblings(waiting: list[Sequence], position: int) -> int:
    """The position behind the sequence at `position` and those of its request that follow it."""
    request = waiting[position].request
    while position < len(waiting) and waiting[position].request is request:
        position += 1
    return position


def _num_shared(seq: Sequence) -> int:
    """How many tokens the sequences of a request take over from each other: its prompt but for the last token."""
    return seq.num_prompt_tokens - 1


def _sibling(seq: Sequence) -> Sequence | None:
    """A running sequence of the same request: one that has computed what they share, else one that computes it."""
    computing = None
    if len(seq.request.seqs) > 1 and _num_shared(seq) > 0:
        for each in seq.request.seqs:
            if each.status is SequenceStatus.RUNNING:
                if each.num_computed_tokens >= _num_shared(seq):
                    return each
                computing = computing or each
    return computing
