"""The host tier alone and under the block manager: who makes room, what is copied when, and that nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.block_manager import ON_HOST, BlockManager
from nanoengine.host_pool import HostPool
from nanoengine.sequence import Sequence
from nanoengine.step import DEVICE_TO_HOST, HOST_TO_DEVICE
from tests.nanoengine.test_block_manager import BLOCK, admit, sequence

A, B, C, D = (bytes([i]) * 16 for i in range(4))


def test_least_recently_kept_content_makes_room_first() -> None:
    pool = HostPool(3)
    assert [pool.keep(each) for each in (A, B, C)] == [0, 1, 2]
    assert pool.keep(A) is None, "it is here already, and most recently used from now on"
    assert pool.keep(D) == 1
    assert [pool.find(each) for each in (A, B, C, D)] == [0, None, 2, 1]
    pool.check_invariants([])


def test_what_the_device_has_again_makes_room_before_all_others_and_tails_before_heads() -> None:
    pool = HostPool(4)
    for each in (A, B, C, D):
        pool.keep(each)
    hits = [pool.hold_hit(C), pool.hold_hit(D)]
    pool.release(hits, on_device=True)
    pool.check_invariants([])
    assert pool.hold_new(None) == hits[1]
    assert pool.hold_new(None) == hits[0]
    assert pool.find(A) == 0


def test_what_a_sequence_held_outlives_older_content_heads_longest() -> None:
    pool = HostPool(4)
    held = [pool.hold_new(A), pool.hold_new(B), pool.hold_new(None)]
    pool.keep(C)
    pool.check_invariants([held])
    pool.release(held)
    assert pool.hold_new(None) == held[2], "what nobody can hit is free at once"
    order = [pool.hold_new(None) for _ in range(3)]
    assert order == [3, held[1], held[0]]


def test_held_blocks_never_make_room() -> None:
    pool = HostPool(2)
    held = [pool.hold_new(A), pool.hold_new(None)]
    assert not pool.can_hold(1)
    assert pool.keep(B) is None
    assert pool.can_hold(0, [held[0]])
    pool.hold(held[0])  # a second sequence of the same prefix
    pool.release(held)
    pool.check_invariants([[held[0]]])
    assert pool.can_hold(1)
    assert not pool.can_hold(2)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release([held[1]])


def test_cached_content_that_is_to_be_held_does_not_count_as_room_too() -> None:
    pool = HostPool(2)
    pool.keep(A)
    assert pool.can_hold(1, [0])
    assert not pool.can_hold(2, [0])


def test_forgetting_prefixes_leaves_held_blocks_alone_and_frees_the_others() -> None:
    pool = HostPool(3)
    held = [pool.hold_new(A)]
    pool.keep(B)
    pool.forget_prefixes()
    pool.check_invariants([held])
    assert (pool.find(A), pool.find(B), pool.num_cached_blocks) == (None, None, 0)
    pool.release(held)
    assert pool.num_free_blocks == 3
    pool.check_invariants([])


def test_prefix_hits_alternate_between_the_tiers_and_count_the_blocks_they_need() -> None:
    manager = BlockManager(6, BLOCK, num_host_blocks=6)
    tokens = [i // BLOCK for i in range(4 * BLOCK)]
    first, _ = admit(manager, tokens)
    manager.free(first)
    filler, _ = admit(manager, [9] * 4 * BLOCK, 2)  # two free ones, and the last two of the first
    assert manager.match_prefix(sequence([*tokens, 1])) == [0, 1, ON_HOST, ON_HOST]
    manager.free(filler)
    manager.take_copies()
    middle, hits = admit(manager, [*tokens, 1], 3)
    assert hits == 4
    copies = manager.take_copies()
    assert [direction for direction, _, _ in copies].count(HOST_TO_DEVICE) == 2
    manager.check_invariants([middle])
    manager.free(middle)
    manager.check_invariants([])


def test_device_hit_follows_a_host_hit() -> None:
    manager = BlockManager(4, BLOCK, num_host_blocks=4)
    seq, _ = admit(manager, [1] * BLOCK + [2] * BLOCK)
    table = list(seq.block_table)
    manager.free(seq)
    manager._cached.move_to_end(table[1])  # as if the second block had been used since without the first
    other, _ = admit(manager, [3] * 3 * BLOCK, 2)
    probe = sequence([1] * BLOCK + [2] * BLOCK + [5])
    hits = manager.match_prefix(probe)
    assert hits == [ON_HOST, table[1]]
    manager.free(other)
    assert manager.can_allocate(1, hits, 1)
    assert not manager.can_allocate(1, hits, 2), "both hits take a block that counts as free"
    manager.allocate(probe, 9, hits)
    assert probe.block_table[1] == table[1]
    assert probe.num_computed_tokens == 8
    manager.check_invariants([probe])


def test_block_evicted_and_hit_again_in_one_step_is_copied_out_before_it_is_copied_back() -> None:
    manager = BlockManager(6, BLOCK, num_host_blocks=3)
    old, _ = admit(manager, [1] * 2 * BLOCK)  # blocks 0 and 1
    other, _ = admit(manager, [3] * 2 * BLOCK, 2)  # 2 and 3
    manager.free(old)
    manager.free(other)
    taker, hitter = sequence([2] * 3 * BLOCK, 3), sequence([1] * 2 * BLOCK + [7], 4)
    manager.allocate(taker, 3 * BLOCK)  # 4, 5, and 1, the least recently used
    hits = manager.match_prefix(hitter)
    assert hits == [0, ON_HOST]
    manager.allocate(hitter, 2 * BLOCK + 1, hits)
    assert manager.take_copies() == [
        (DEVICE_TO_HOST, 1, 0),
        (DEVICE_TO_HOST, 3, 1),
        (HOST_TO_DEVICE, 0, 3),
        (DEVICE_TO_HOST, 2, 2),
    ]
    assert hitter.block_table == [0, 3, 2]
    manager.check_invariants([taker, hitter])


def test_host_block_that_a_hit_reads_is_not_refilled_before_it_is_read() -> None:
    """One host block, and the hit on it needs a block of the device whose old content would like to go there."""
    manager = BlockManager(2, BLOCK, num_host_blocks=1)
    wanted, _ = admit(manager, [1] * BLOCK)
    manager.free(wanted)
    others, _ = admit(manager, [2] * BLOCK + [3] * BLOCK, 2)
    manager.free(others)
    assert manager.take_copies() == [(DEVICE_TO_HOST, 0, 0)]
    again = sequence([1] * BLOCK + [7])
    assert manager.match_prefix(again) == [ON_HOST]
    manager.allocate(again, 5, [ON_HOST])
    copies = manager.take_copies()
    read = next(i for i, copy in enumerate(copies) if copy[0] == HOST_TO_DEVICE)
    assert all(copy[0] != DEVICE_TO_HOST for copy in copies[:read])
    manager.check_invariants([again])


class Content:
    """What every block holds, by the copies alone: the hash that its content would have."""

    def __init__(self, manager: BlockManager) -> None:
        self.manager = manager
        self.device: dict[int, object] = {}
        self.host: dict[int, object] = {}

    def settle(self, computed: list[tuple[Sequence, int, int]] = []) -> None:  # noqa: B006 - never changed
        """Perform the copies, then write what the step computes: the tokens of each block so far."""
        for direction, source, destination in self.manager.take_copies():
            if direction == DEVICE_TO_HOST:
                self.host[destination] = self.device[source]
            else:
                self.device[destination] = self.host[source]
        for seq, start, end in computed:
            for i in range(start // BLOCK, -(-end // BLOCK)):
                self.device[seq.block_table[i]] = tuple(seq.token_ids[: min(end, (i + 1) * BLOCK)])

    def check(self, live: list[Sequence]) -> None:
        for seq in live:
            for i in range(-(-seq.num_computed_tokens // BLOCK)):
                expected = tuple(seq.token_ids[: min(seq.num_computed_tokens, (i + 1) * BLOCK)])
                found = self.host[seq.host_blocks[i]] if seq.host_blocks else self.device[seq.block_table[i]]
                assert found == expected, f"block {i} of {seq}"


@settings(max_examples=100, deadline=None)
@given(
    st.integers(4, 16),
    st.integers(0, 12),
    st.booleans(),
    st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.lists(st.integers(1, 2), min_size=1, max_size=30)),
            st.tuples(st.just("grow"), st.integers(0, 9), st.integers(1, 6)),
            st.tuples(st.just("swap"), st.integers(0, 9)),
            st.tuples(st.just("free"), st.integers(0, 9)),
            st.tuples(st.just("reset")),
        ),
        max_size=60,
    ),
)
def test_random_operations_keep_every_content_where_the_books_say(
    num_blocks: int, num_host_blocks: int, caching: bool, operations: list
) -> None:
    manager = BlockManager(num_blocks, BLOCK, caching, num_host_blocks)
    content, live = Content(manager), list[Sequence]()
    for number, operation in enumerate(operations):
        match operation:
            case ("admit", tokens):
                seq = sequence(tokens, number)
                hits = manager.match_prefix(seq)
                if manager.can_allocate(manager.blocks_for(len(tokens)) - len(hits), hits):
                    manager.allocate(seq, len(tokens), hits)
                    start, seq.num_computed_tokens = seq.num_computed_tokens, len(tokens)
                    content.settle([(seq, start, len(tokens))])
                    manager.publish(seq, start, len(tokens))
                    live.append(seq)
            case ("grow", which, count) if live:  # a swapped one comes back first
                seq = live[which % len(live)]
                start = seq.num_tokens
                hits = manager.match_prefix(seq) if seq.host_blocks else []
                held = len(seq.block_table) + len(hits)
                if manager.can_allocate(manager.blocks_for(start + count) - held, hits):
                    seq.token_ids.extend([1] * count)
                    manager.allocate(seq, seq.num_tokens, hits)
                    seq.num_computed_tokens = seq.num_tokens
                    content.settle([(seq, start, seq.num_tokens)])
                    manager.publish(seq, start, seq.num_tokens)
            case ("swap", which) if live:
                seq = live[which % len(live)]
                if not seq.host_blocks and not manager.swap_out(seq):
                    manager.free(live.pop(which % len(live)))
            case ("free", which) if live:
                manager.free(live.pop(which % len(live)))
            case ("reset",):
                manager.reset_prefix_cache()
        manager.check_invariants(live)
        if number % 3 == 0:  # else several changes come before the workers hear of them
            content.settle()
            content.check(live)
    content.settle()
    content.check(live)
    for seq in live:
        manager.free(seq)
    manager.check_invariants([])
    assert (manager.num_free_blocks, manager.host.num_free_blocks) == (num_blocks, num_host_blocks)
