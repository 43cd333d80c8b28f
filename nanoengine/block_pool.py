"""The books of one tier of the K/V cache: which of its blocks are held, cached or free; knows no sequence and no copy.

A block is held by at least one sequence (reference count above 0), cached (count 0, but its content is known by hash
and may be hit), or free (count 0, content unknown). Blocks are taken from the free ones, then from the cached ones,
the least recently used first; a block that is taken no longer answers to its old content.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Iterable


class BlockPool:
    """The blocks of one tier, numbered from 0. What uses it adds who holds a block, and why."""

    def __init__(self, num_blocks: int) -> None:
        self._empty(num_blocks)

    def _empty(self, num_blocks: int) -> None:
        """Begin anew: every block is free, and no content is known."""
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

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
        """Those blocks, least recently used first."""
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
        """Count one holder more of a block whose content is known."""
        if self._ref_counts[block] == 0:
            del self._cached[block]
        self._ref_counts[block] += 1

    def forget_prefixes(self) -> None:
        """Forget every hash; what sequences hold stays theirs, but nobody will hit it any more."""
        self._free.extend(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks

    def _take(self) -> tuple[int, bytes | None]:
        """A block that nobody holds, for other content, and the hash of what it held if that was known."""
        if self._free:
            return self._free.popleft(), None
        block, _ = self._cached.popitem(last=False)
        old_hash = self._hash_of[block]
        assert old_hash is not None
        del self._block_of[old_hash]
        self._hash_of[block] = None
        return block, old_hash

    def _name(self, block: int, block_hash: bytes) -> None:
        """Let the block's content be found by that hash."""
        assert block_hash not in self._block_of, "the same content is in one tier twice"
        self._hash_of[block] = block_hash
        self._block_of[block_hash] = block

    def _release(self, block: int) -> None:
        """Count one holder less; without any, the block is cached, most recently used, or free."""
        self._ref_counts[block] -= 1
        assert self._ref_counts[block] >= 0, f"block {block} was released twice: its holder was freed twice"
        if self._ref_counts[block]:
            return
        if self._hash_of[block] is None:
            self._free.append(block)
        else:
            self._cached[block] = None

    def _check_books(self, tables: Iterable[list[int]], what: str) -> None:
        """Raise AssertionError unless every block is accounted for, given the blocks that each sequence holds."""
        held = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a sequence holds a {what} twice"
            for block in table:
                held[block] += 1
        assert held == self._ref_counts, f"reference counts of {what}s differ from what the sequences hold"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), f"a {what} is free twice"
        assert not free & cached, f"a {what} is both free and cached"
        for block, count in enumerate(held):
            unheld = block in free or block in cached
            assert unheld == (count == 0), f"{what} {block} has {count} holders and is {'' if unheld else 'not '}free"
            hashed = self._hash_of[block]
            assert block not in free or hashed is None, f"free {what} {block} kept its hash"
            assert block not in cached or hashed is not None, f"cached {what} {block} has no hash"
            assert hashed is None or self._block_of.get(hashed) == block, f"the hash of {what} {block} names another"
        assert len(self._block_of) == sum(h is not None for h in self._hash_of), f"a hash names a {what} that lost it"
