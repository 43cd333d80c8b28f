"""The host tier of the K/V cache: which of its blocks hold what; knows neither the device's blocks nor any copy.

A host block is held by swapped sequences (reference count above 0), cached (count 0, but its content is known by hash
and may be hit), or free. Held ones stay until every holder has let go; cached ones make room, least recently used
first. What lies on the device as well makes room before all others: it is the content that nobody would miss.

Content never changes while a block is held or known by hash, so sequences with a common prefix share its blocks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable


class HostPool:
    """Blocks of the swap space, the same on all ranks."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # first to make room first

    @property
    def num_free_blocks(self) -> int:
        """Blocks that may be taken, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that no sequence holds and whose content may be hit."""
        return len(self._cached)

    @property
    def cached_blocks(self) -> Collection[int]:
        """Those blocks, first to make room first."""
        return self._cached.keys()

    @property
    def ref_counts(self) -> list[int]:
        """How many sequences hold it, for each block; to be read only."""
        return self._ref_counts

    def find(self, block_hash: bytes | None) -> int | None:
        """The block with the content of that hash, if there is one; nothing has the hash None."""
        return None if block_hash is None else self._block_of.get(block_hash)

    def hash_of(self, block: int) -> bytes | None:
        """Under which hash the block's content is known, if it is."""
        return self._hash_of[block]

    def can_hold(self, num_new: int, known: Iterable[int] = ()) -> bool:
        """Whether `num_new` blocks can be had beside the `known` ones; a cached one counts as free until it is held."""
        return num_new + sum(self._ref_counts[block] == 0 for block in known) <= self.num_free_blocks

    def hold(self, block: int) -> None:
        """Keep a block until `release`; what it holds is to be read."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def hold_hit(self, block_hash: bytes) -> int:
        """Likewise the block that `find` has just found."""
        block = self._block_of[block_hash]
        self.hold(block)
        return block

    def hold_new(self, block_hash: bytes | None) -> int:
        """A block for content to come, held; `can_hold` comes first. The hash is what it will be known by, if any."""
        block = self._new_block(block_hash)
        self._ref_counts[block] = 1
        return block

    def release(self, blocks: Iterable[int], on_device: bool = False) -> None:
        """Let go of what a sequence held, in the order of its tokens; prefixes outlive tails.

        Args:
            blocks: held ones.
            on_device: their content is on the device as well now.
        """
        # Towards the end that makes room first, heads before tails; or towards the other, tails before heads.
        for block in blocks if on_device else reversed(list(blocks)):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"host block {block} was released twice"
            if self._ref_counts[block]:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None
                self._cached.move_to_end(block, last=not on_device)

    def keep(self, block_hash: bytes) -> int | None:
        """The device lets go of content with that hash: the block to copy it to, the most recently used from now on.

        None when the content is here already, or when sequences hold every block.
        """
        block = self._block_of.get(block_hash)
        if block is not None:
            if block in self._cached:
                self._cached.move_to_end(block)
            return None
        if not self.num_free_blocks:
            return None
        block = self._new_block(block_hash)
        self._cached[block] = None
        return block

    def forget_prefixes(self) -> None:
        """Forget every hash; what sequences hold stays theirs, but nobody will hit it any more."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def _new_block(self, block_hash: bytes | None) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            old_hash = self._hash_of[block]
            assert old_hash is not None
            del self._block_of[old_hash]
        self._hash_of[block] = block_hash
        if block_hash is not None:
            assert block_hash not in self._block_of, "the same content is on the host twice"
            self._block_of[block_hash] = block
        return block

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless every block is accounted for, given the host blocks of each swapped sequence."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a host block twice"
            for block in table:
                held[block] += 1
        assert held == self._ref_counts, "host blocks' reference counts differ from what the sequences hold"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a host block is free twice"
        assert not free & cached, "a host block is both free and cached"
        for block, count in enumerate(held):
            hashed = self._hash_of[block]
            assert (block in free or block in cached) == (count == 0), f"host block {block} has {count} holders"
            assert block not in free or hashed is None, f"free host block {block} kept its hash"
            assert block not in cached or hashed is not None, f"cached host block {block} has no hash"
            assert hashed is None or self._block_of.get(hashed) == block, (
                f"the hash of host block {block} names another"
            )
        assert len(self._block_of) == sum(h is not None for h in self._hash_of), (
            "a hash names a host block that lost it"
        )
