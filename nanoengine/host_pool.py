"""The host tier of the K/V cache: which of its blocks hold what; knows neither the device's blocks nor any copy.

A host block is held by swapped sequences, cached or free (`block_pool.py`). Held ones stay until every holder has let
go; cached ones make room. What lies on the device as well makes room before all others: nobody would miss it.

Content never changes while a block is held or known by hash, so sequences with a common prefix share its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from nanoengine.block_pool import BlockPool


class HostPool(BlockPool):
    """Blocks of the swap space, the same on all ranks."""

    def hold_hit(self, block_hash: bytes) -> int:
        """Hold the block that `find` has just found."""
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
            self._release(block)
            if on_device and block in self._cached:
                self._cached.move_to_end(block, last=False)

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

    def _new_block(self, block_hash: bytes | None) -> int:
        block, _ = self._take()
        if block_hash is not None:
            self._name(block, block_hash)
        return block

    def check_invariants(self, tables: Iterable[list[int]]) -> None:
        """Raise AssertionError unless every block is accounted for, given the host blocks of each swapped sequence."""
        self._check_books(tables, "host block")
