"""Hands out K/V blocks and remembers which prefixes lie in them; knows neither queues nor tensors.

A block is held by at least one sequence, cached or free (`block_pool.py`). New blocks come from the free ones, then
from the cached ones, least recently used first.

A full block's hash covers its tokens and, through its parent's hash, everything before them and the request's salt. It
is published only after the step that filled the block has returned, so no sequence can hit what is not computed yet.
Until then the hash is announced: a sequence that needs the same block may wait for it instead of computing it too.

A forked sequence shares its parent's blocks, the last of them perhaps partly filled (a shared tail). Whoever is about
to write into a block that is not its own alone copies it first; prefix hits are full blocks and never written.

Below the device's blocks lies the host tier (`host_pool.py`), where there is swap space: a cached block that is taken
for something else is copied there first, and a prefix hit in it is copied back. A sequence that gives way may be
swapped out there as well. The workers perform the copies in order, before they compute the step that they come with;
so a block is right from the moment its copy is noted, and who takes over a block writes behind the copy of its old
content.
"""

from __future__ import annotations

import secrets
from array import array
from collections.abc import Collection, Iterable
from hashlib import blake2b

from nanoengine.block_pool import BlockPool
from nanoengine.host_pool import HostPool
from nanoengine.sequence import Sequence
from nanoengine.step import DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE, BlockCopy

# Among prefix hits: the content is on the host, and needs a block of the device to be copied to.
ON_HOST = -1


class BlockManager(BlockPool):
    """Blocks of one worker group, all ranks alike: every rank's cache has the same block ids.

    `num_hit_tokens` counts the prefix hits on the host too, `num_host_hit_tokens` those alone; `num_blocks_swapped_out`
    and `num_blocks_swapped_in` count the blocks copied to the host and back, of sequences and of prefixes.
    """

    def __init__(
        self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True, num_host_blocks: int = 0
    ) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        # Drawn anew each time, so that nobody outside can construct prompts whose hashes collide.
        self._keyed = blake2b(digest_size=16, key=secrets.token_bytes(32))
        self.num_query_tokens = 0
        self.num_hit_tokens = self.num_host_hit_tokens = 0
        self.num_blocks_swapped_out = self.num_blocks_swapped_in = 0
        self.reset(num_blocks, num_host_blocks)

    def reset(self, num_blocks: int, num_host_blocks: int) -> None:
        """Forget everything but the counters: a new worker group has an empty cache, and old hashes would be lies."""
        self._empty(num_blocks)
        self.host = HostPool(num_host_blocks)
        self._announced: dict[bytes, Sequence] = {}  # who computes it
        self._copies: list[BlockCopy] = []
        # Sequences that may be about to write into a block that is not theirs alone; looked up, never iterated over.
        self.tail_sharers: set[Sequence] = set()

    def count_on(self, before: BlockManager) -> None:
        """Let the counters go on where those of `before` are."""
        self.num_query_tokens, self.num_hit_tokens = before.num_query_tokens, before.num_hit_tokens
        self.num_host_hit_tokens = before.num_host_hit_tokens
        self.num_blocks_swapped_out, self.num_blocks_swapped_in = (
            before.num_blocks_swapped_out,
            before.num_blocks_swapped_in,
        )

    def take_copies(self) -> list[BlockCopy]:
        """The copies that every rank has to perform before it computes the next step, in order."""
        copies, self._copies = self._copies, []
        return copies

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def num_new_blocks(self, seq: Sequence, num_tokens: int) -> int:
        """How many blocks `allocate` would take for `seq` to hold `num_tokens`, a copied one included."""
        return max(0, self.blocks_for(num_tokens) - len(seq.block_table)) + self._must_copy(seq)

    def match_prefix(self, seq: Sequence) -> list[int]:
        """The blocks that already hold a prefix of `seq`, from its first on, or ON_HOST; takes nothing yet.

        What has an output to give is left to compute, at least the last token, since its logits are wanted. For a
        swapped sequence these are all that it has computed, of which some may still be on the device, or again.
        """
        if seq.host_blocks:
            return [self._on_device(self.host.hash_of(block)) for block in seq.host_blocks]
        if not self.enable_prefix_caching:
            return []
        hits: list[int] = []
        for block_hash in self._hashes(seq, seq.num_hittable_tokens // self.block_size):
            block = self._on_device(block_hash)
            if block == ON_HOST and self.host.find(block_hash) is None:
                break
            hits.append(block)
        return hits

    def _on_device(self, block_hash: bytes | None) -> int:
        """The device's block with the content of that hash, or ON_HOST; nothing has the hash None."""
        block = self.find(block_hash)
        return ON_HOST if block is None else block

    def is_coming(self, seq: Sequence, num_hits: int) -> bool:
        """Whether another sequence is computing the block of `seq` that follows its hits."""
        if not self.enable_prefix_caching or num_hits >= seq.num_hittable_tokens // self.block_size:
            return False
        if seq.host_blocks:
            return False  # it goes on where it was
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

    def can_allocate(self, num_new: int, hits: Collection[int] = (), reserve: int = 0) -> bool:
        """Whether `num_new` blocks can be taken beside the `hits`, leaving `reserve` blocks.

        A hit of reference count 0 counts as free until it is taken, so it must not be counted twice; one on the host
        takes a free block, too.
        """
        on_device = [block for block in hits if block != ON_HOST]
        return self.can_hold(num_new + len(hits) - len(on_device) + reserve, on_device)

    def allocate(self, seq: Sequence, num_tokens: int, hits: Iterable[int] = ()) -> None:
        """Give `seq` the `hits` (for a sequence without blocks), then new blocks until it can hold `num_tokens`.

        A tail that it shares becomes its own by a copy. `can_allocate` comes first; what it granted cannot fail here.
        """
        hits = list(hits)
        if hits:
            assert not seq.block_table, f"{seq} holds blocks already"
            if not seq.host_blocks:
                seq.num_computed_tokens = len(hits) * self.block_size
            for block in hits:
                if block != ON_HOST:
                    self.hold(block)
            seq.block_table.extend(self._copied_back(seq, hits) if ON_HOST in hits or seq.host_blocks else hits)
        elif seq in self.tail_sharers:
            if self._must_copy(seq):
                self._copy_tail(seq)
            self.tail_sharers.discard(seq)
        for _ in range(self.blocks_for(num_tokens) - len(seq.block_table)):
            seq.block_table.append(self._new_block())

    def extend(self, seqs: Iterable[Sequence]) -> None:
        """Give each of `seqs` one block more; `can_allocate` granted that many."""
        for seq in seqs:
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
        assert not parent.host_blocks, f"{parent} is swapped out: its blocks are not on the device"
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

    def _copied_back(self, seq: Sequence, hits: list[int]) -> list[int]:
        """The hits, with blocks of the device for those on the host. What `seq` held there, it lets go of."""
        if seq.host_blocks:
            sources = dict(enumerate(seq.host_blocks))
            seq.host_blocks = []
        else:
            # Held meanwhile: a new block of the device may need room on the host for its old content.
            hashes = self._hashes(seq, len(hits))
            sources = {i: self.host.hold_hit(hashes[i]) for i, block in enumerate(hits) if block == ON_HOST}
            self.num_host_hit_tokens += len(sources) * self.block_size
        blocks = [self._copy_back(sources[i]) if block == ON_HOST else block for i, block in enumerate(hits)]
        self.host.release(sources.values(), on_device=True)
        return blocks

    def _copy_back(self, host_block: int) -> int:
        """A new block with the content of a host block, under the same hash: who hits it reads it behind the copy."""
        block, block_hash = self._new_block(), self.host.hash_of(host_block)
        self._copies.append((HOST_TO_DEVICE, host_block, block))
        self.num_blocks_swapped_in += 1
        if block_hash is not None:
            self._name(block, block_hash)
        return block

    def swap_out(self, seq: Sequence) -> bool:
        """Move what is computed of `seq` to the host and free its blocks; False if the host cannot hold it.

        A step in flight may still be computing the last of it: the copies are performed after that. What the host
        knows already by its hash is not copied.
        """
        table = seq.block_table[: self.blocks_for(seq.num_computed_tokens)]
        hashes = [self._hash_of[block] for block in table]
        if seq.num_computed_tokens % self.block_size:
            hashes[-1] = None  # what it shares there of another's full block, it will write behind
        known = [self.host.find(block_hash) for block_hash in hashes]
        if not table or not self.host.can_hold(known.count(None), [block for block in known if block is not None]):
            return False
        for host_block in known:
            if host_block is not None:
                self.host.hold(host_block)
        host_blocks = []
        for block, block_hash, host_block in zip(table, hashes, known, strict=True):
            if host_block is None:
                host_block = self.host.hold_new(block_hash)
                self._copy_out(block, host_block)
            host_blocks.append(host_block)
        self.free(seq)
        seq.host_blocks = host_blocks
        seq.num_sent_blocks = None
        return True

    def _copy_out(self, block: int, host_block: int) -> None:
        self._copies.append((DEVICE_TO_HOST, block, host_block))
        self.num_blocks_swapped_out += 1

    def count_query(self, seq: Sequence, num_hit_blocks: int) -> None:
        """Count one admission for the hit rate."""
        self.num_query_tokens += seq.num_tokens
        self.num_hit_tokens += num_hit_blocks * self.block_size

    def free(self, seq: Sequence) -> None:
        """Give back every block of `seq`. Its last blocks become the least recently used: prefixes outlive tails."""
        self.host.release(seq.host_blocks)
        seq.host_blocks = []
        for block_hash in seq.block_hashes:
            self._withdraw(seq, block_hash)
        for block in reversed(seq.block_table):
            self._release(block)
        seq.block_table.clear()
        self.tail_sharers.discard(seq)

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
                self._name(block, block_hash)

    def reset_prefix_cache(self) -> None:
        """Forget what is cached; blocks that sequences hold stay theirs, but nobody will hit them any more."""
        self.host.forget_prefixes()
        self.forget_prefixes()

    def _hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Hashes of the first `num_blocks` full blocks of `seq`; what was computed once is kept with it."""
        known, size = seq.block_hashes, self.block_size
        while len(known) < num_blocks:
            i = len(known)
            tokens = array("q", seq.token_ids[i * size : (i + 1) * size]).tobytes()
            parent = known[-1] if known else self._digest(seq.request.cache_salt.encode())
            known.append(self._digest(parent + tokens))
        return known if len(known) == num_blocks else known[:num_blocks]

    def _digest(self, data: bytes) -> bytes:
        digest = self._keyed.copy()  # half the time of taking in the key anew
        digest.update(data)
        return digest.digest()

    def _new_block(self) -> int:
        block, old_hash = self._take()
        if old_hash is not None and (host_block := self.host.keep(old_hash)) is not None:
            self._copy_out(block, host_block)
        self._ref_counts[block] = 1
        return block

    def check_invariants(self, live: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is accounted for, given all sequences that may hold blocks."""
        live = list(live)
        computing = {seq.seq_id for seq in live if seq.block_table}
        assert computing >= {seq.seq_id for seq in self._announced.values()}, "a block is announced by nobody"
        for seq in live:
            assert not self._must_copy(seq) or seq in self.tail_sharers, f"{seq} would write into a shared block"
        assert self.tail_sharers <= set(live), "a sequence that ended shares a block"
        self._check_books([seq.block_table for seq in live], "block")
        assert not any(seq.block_table and seq.host_blocks for seq in live), "a sequence is swapped out and is not"
        self.host.check_invariants([seq.host_blocks for seq in live])
