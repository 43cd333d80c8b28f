"""Hands out K/V blocks and remembers which prefixes lie in them; knows neither queues nor tensors.

A block is in one of three states: held by at least one sequence (reference count above 0), cached (count 0, but its
content is known by hash and may be hit), or free (count 0, content unknown). New blocks come from the free ones,
then from the cached ones, least recently used first.

A full block's hash covers its tokens and, through its parent's hash, everything before them and the request's salt. It
is published only after the step that filled the block has returned, so no sequence can hit what is not computed yet.
Until then the hash is announced: a sequence that needs the same block may wait for it instead of computing it too.

A forked sequence shares its parent's blocks, the last of them perhaps partly filled (a shared tail). Whoever is about
to write into a block that is not its own alone copies it first; prefix hits are full blocks and never written.
"""

from __future__ import annotations

import secrets
from array import array
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable
from hashlib import blake2b

from nanoengine.sequence import Sequence
from nanoengine.step import DEVICE_TO_DEVICE, BlockCopy


class BlockManager:
    """Blocks of one worker group, all ranks alike: every rank's cache has the same block ids."""

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Drawn anew each time, so that nobody outside can construct prompts whose hashes collide.
        self._key = secrets.token_bytes(32)
        self.num_query_tokens = 0
        self.num_hit_tokens = 0
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new worker group starts with an empty cache, and every old hash would be a lie."""
        self._ref_counts = [0] * self.num_blocks
        self._hash_of: list[bytes | None] = [None] * self.num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(self.num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._announced: dict[bytes, Sequence] = {}  # who computes it
        self._copies: list[BlockCopy] = []
        # Sequences that may be about to write into a block that is not theirs alone; looked up, never iterated over.
        self.tail_sharers: set[Sequence] = set()

    def take_copies(self) -> list[BlockCopy]:
        """The copies that every rank has to perform before it computes the next step, in order."""
        copies, self._copies = self._copies, []
        return copies

    @property
    def num_free_blocks(self) -> int:
        """Blocks that an allocation may take, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks of reference count 0 whose content may still be hit."""
        return len(self._cached)

    @property
    def cached_blocks(self) -> Collection[int]:
        """Those blocks, least recently used first."""
        return self._cached.keys()

    @property
    def ref_counts(self) -> list[int]:
        """How many sequences hold it, for each block; to be read only."""
        return self._ref_counts

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_new_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """How many blocks `allocate` would take for `seq` to hold `num_tokens`, a copied one included."""
        return max(0, self.blocks_for(num_tokens) - len(seq.block_table)) + self._must_copy(seq)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The blocks that already hold a prefix of `seq`, from its first on; takes nothing yet.

        At least the last token is left to compute, since its logits are wanted.
        """
        if not self.enable_prefix_caching:
            return []
        hits: list[int] = []
        for block_hash in self._hashes(seq, (seq.num_tokens - 1) // self.block_size):
            block = self._block_of.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def is_coming(self, seq: Sequence, num_hits: int) -> bool:
        """Whether another sequence is computing the block of `seq` that follows its hits."""
        if not self.enable_prefix_caching or num_hits >= (seq.num_tokens - 1) // self.block_size:
            return False
        return self._hashes(seq, num_hits + 1)[num_hits] in self._announced

    def announce(self, seq: Sequence) -> None:
        """`seq` is going to compute its full blocks from here on; what nobody else computes, others may wait for."""
        if self.enable_prefix_caching:
            first = seq.num_computed_tokens // self.block_size
            for block_hash in self._hashes(seq, seq.num_tokens // self.block_size)[first:]:
                self._announced.setdefault(block_hash, seq)

    def _withdraw(self, seq: Sequence, block_hash: bytes) -> None:
        if self._announced.get(block_hash) is seq:
            del self._announced[block_hash]

    def can_allocate(self, num_new: int, hits: Iterable[int] = (), reserve: int = 0) -> bool:
        """Whether `num_new` blocks can be taken beside the `hits`, leaving `reserve` blocks.

        A hit of reference count 0 counts as free until it is taken, so it must not be counted twice.
        """
        unheld = sum(self._ref_counts[block] == 0 for block in hits)
        return num_new + unheld + reserve <= self.num_free_blocks

    def allocate(self, seq: Sequence, num_tokens: int, hits: Iterable[int] = ()) -> None:
        """Give `seq` the `hits` (for a sequence without blocks), then new blocks until it can hold `num_tokens`.

        A tail that it shares becomes its own by a copy. `can_allocate` comes first; what it granted cannot fail here.
        """
        hits = list(hits)
        if hits:
            assert not seq.block_table, f"{seq} holds blocks already"
            for block in hits:
                self._take(block)
            seq.block_table.extend(hits)
            seq.num_computed_tokens = len(hits) * self.block_size
        elif seq in self.tail_sharers:
            if self._must_copy(seq):
                self._copy_tail(seq)
            self.tail_sharers.discard(seq)
        for _ in range(self.blocks_for(num_tokens) - len(seq.block_table)):
            seq.block_table.append(self._new_block())

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int | None = None) -> None:
        """Let `child` share the blocks of the first `num_tokens` tokens of `parent`, by default all it has computed.

        The tokens are the same in both, and the child holds no blocks yet (those that `Sequence.fork` listed are the
        parent's still). Takes no block and copies nothing, so it cannot fail: a partly filled last block is copied
        by `allocate` when one of them is about to write into it. A step in flight may still be computing the
        parent's tokens, since copies are performed in the order of the steps.
        """
        num_tokens = parent.num_computed_tokens if num_tokens is None else num_tokens
        assert num_tokens <= parent.num_computed_tokens, f"{parent} has not computed {num_tokens} tokens to share"
        assert child.num_sent_blocks is None, f"{child} runs already"
        num_full, rest = divmod(num_tokens, self.block_size)
        child.block_table = parent.block_table[: num_full + (rest > 0)]
        for block in child.block_table:
            self._ref_counts[block] += 1
        if rest:
            self.tail_sharers.update((parent, child))
        child.num_computed_tokens = num_tokens
        if len(child.block_hashes) < num_full:
            child.block_hashes = parent.block_hashes[:num_full]

    def _must_copy(self, seq: Sequence) -> bool:
        """Whether the next token of `seq` goes into a block that others share, or that is published."""
        index, offset = divmod(seq.num_computed_tokens, self.block_size)
        if not offset or index >= len(seq.block_table):
            return False  # it opens a new block
        block = seq.block_table[index]
        return self._ref_counts[block] > 1 or self._hash_of[block] is not None

    def _copy_tail(self, seq: Sequence) -> None:
        """Replace the block that `seq` writes next by a copy of its own."""
        assert not seq.num_pending_tokens, f"{seq} is scheduled ahead and shares a block that it writes"
        index = seq.num_computed_tokens // self.block_size
        shared, own = seq.block_table[index], self._new_block()
        self._copies.append((DEVICE_TO_DEVICE, shared, own))
        seq.block_table[index] = own
        self._release(shared)
        # The workers only ever append to a table that they know: the whole of it travels with the next row.
        seq.num_sent_blocks = None

    def count_query(self, seq: Sequence, num_hit_blocks: int) -> None:
        """Count one admission for the hit rate."""
        self.num_query_tokens += seq.num_tokens
        self.num_hit_tokens += num_hit_blocks * self.block_size

    def free(self, seq: Sequence) -> None:
        """Give back every block of `seq`. Its last blocks become the least recently used: prefixes outlive tails."""
        for block_hash in seq.block_hashes:
            self._withdraw(seq, block_hash)
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table.clear()
        self.tail_sharers.discard(seq)

    def _release(self, block: int) -> None:
        """Count one holder less; without any, the block is cached or free."""
        self._ref_counts[block] -= 1
        assert self._ref_counts[block] >= 0, f"block {block} was freed twice"
        if self._ref_counts[block]:
            return
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def publish(self, seq: Sequence, start: int, end: int) -> None:
        """Make the blocks of `seq` that the tokens from `start` to `end` filled up available to prefix hits.

        Where the same content is published already, the block stays this sequence's private copy.
        """
        if not self.enable_prefix_caching:
            return
        first, last = start // self.block_size, end // self.block_size
        if first == last:
            return  # most decodes fill no block
        hashes = self._hashes(seq, last)
        for i in range(first, last):
            block, block_hash = seq.block_table[i], hashes[i]
            self._withdraw(seq, block_hash)
            if self._hash_of[block] is None and block_hash not in self._block_of:
                self._hash_of[block] = block_hash
                self._block_of[block_hash] = block

    def reset_prefix_cache(self) -> None:
        """Forget what is cached; blocks that sequences hold stay theirs, but nobody will hit them any more."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def _hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks of `seq`; what was computed once is kept with it."""
        known, size = seq.block_hashes, self.block_size
        while len(known) < num_blocks:
            i = len(known)
            tokens = array("q", seq.token_ids[i * size : (i + 1) * size]).tobytes()
            parent = known[-1] if known else self._digest(seq.request.cache_salt.encode())
            known.append(self._digest(parent + tokens))
        return known[:num_blocks]

    def _digest(self, data: bytes) -> bytes:
        return blake2b(data, digest_size=16, key=self._key).digest()

    def _take(self, block: int) -> None:
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def _new_block(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            # A reused block must not answer to its old content.
            old_hash = self._hash_of[block]
            assert old_hash is not None
            del self._block_of[old_hash]
            self._hash_of[block] = None
        self._ref_counts[block] = 1
        return block

    def check_invariants(self, live: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is accounted for, given all sequences that may hold blocks."""
        live = list(live)
        computing = {seq.seq_id for seq in live if seq.block_table}
        assert computing >= {seq.seq_id for seq in self._announced.values()}, "a block is announced by nobody"
        held = [0] * self.num_blocks
        for seq in live:
            assert len(set(seq.block_table)) == len(seq.block_table), f"{seq} holds a block twice"
            for block in seq.block_table:
                held[block] += 1
            assert not self._must_copy(seq) or seq in self.tail_sharers, f"{seq} would write into a shared block"
        assert self.tail_sharers <= set(live), "a sequence that ended shares a block"
        assert held == self._ref_counts, "reference counts differ from what the sequences hold"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, "a block is both free and cached"
        for block, count in enumerate(held):
            unheld = block in free or block in cached
            assert unheld == (count == 0), f"block {block} has {count} holders and is {'' if unheld else 'not '}free"
            hashed = self._hash_of[block]
            assert block not in free or hashed is None, f"free block {block} kept its hash"
            assert block not in cached or hashed is not None, f"cached block {block} has no hash"
            assert hashed is None or self._block_of.get(hashed) == block, f"the hash of block {block} names another"
        assert len(self._block_of) == sum(h is not None for h in self._hash_of), "a hash names a block that lost it"
