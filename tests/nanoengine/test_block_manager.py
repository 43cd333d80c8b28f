"""The block manager alone: reuse, eviction order and reference counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.block_manager import BlockManager
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, Sequence

BLOCK = 4


def sequence(tokens: list[int], seq_id: int = 1) -> Sequence:
    return Sequence(seq_id, Request("r", tokens, SamplingParams()), 0, [])


def admit(manager: BlockManager, tokens: list[int], seq_id: int = 1) -> tuple[Sequence, int]:
    """Run a sequence's prompt through the manager as the scheduler would; returns it and its hits."""
    seq = sequence(tokens, seq_id)
    hits = manager.match_prefix(seq)
    assert manager.can_allocate(manager.blocks_for(len(tokens)) - len(hits), hits)
    manager.allocate(seq, len(tokens), hits)
    manager.publish(seq, seq.num_computed_tokens, len(tokens))
    return seq, len(hits)


def test_reused_block_does_not_answer_to_its_old_content() -> None:
    manager = BlockManager(2, BLOCK)
    old, _ = admit(manager, [1] * 8)
    manager.free(old)
    new, hits = admit(manager, [2] * 8)
    assert hits == 0
    manager.free(new)
    assert manager.match_prefix(sequence([1] * 9)) == []
    assert len(manager.match_prefix(sequence([2] * 9))) == 2
    manager.check_invariants([])


def test_two_identical_prefixes_computed_at_once_stay_valid_and_are_freed_once() -> None:
    manager = BlockManager(8, BLOCK)
    first, second = sequence([1] * 9, 1), sequence([1] * 9, 2)
    for seq in (first, second):  # allocated in one step: neither can hit the other
        manager.allocate(seq, 9, manager.match_prefix(seq))
    for seq in (first, second):
        manager.publish(seq, 0, 9)
    manager.check_invariants([first, second])
    manager.free(first)
    manager.check_invariants([second])
    manager.free(second)
    manager.check_invariants([])
    assert manager.num_free_blocks == 8
    assert len(manager.match_prefix(sequence([1] * 9))) == 2


def test_freed_block_of_a_shared_prefix_stays_with_its_other_holder() -> None:
    manager = BlockManager(8, BLOCK)
    first, _ = admit(manager, [1] * 9, 1)
    second, hits = admit(manager, [1] * 9, 2)
    assert hits == 2
    manager.free(first)
    manager.check_invariants([second])
    assert second.block_table[:2] == manager.match_prefix(sequence([1] * 9))


def test_cached_blocks_are_not_counted_twice_as_free_and_as_hits() -> None:
    manager = BlockManager(4, BLOCK)
    seq, _ = admit(manager, [1] * 16)
    manager.free(seq)
    again = sequence([1] * 16 + [2] * 5)
    hits = manager.match_prefix(again)
    assert len(hits) == 4
    assert manager.num_free_blocks == 4
    assert not manager.can_allocate(manager.blocks_for(21) - len(hits), hits)


def test_least_recently_used_prefix_is_evicted_first_and_tails_before_heads() -> None:
    manager = BlockManager(6, BLOCK)
    for i, tokens in enumerate(([1] * 8, [2] * 8, [3] * 8)):
        seq, _ = admit(manager, tokens, i)
        manager.free(seq)
    touched, hits = admit(manager, [1] * 9, 9)  # uses the oldest again, and takes one block of the next oldest
    assert hits == 2
    manager.free(touched)
    assert len(manager.match_prefix(sequence([1] * 9))) == 2
    assert len(manager.match_prefix(sequence([2] * 9))) == 1, "the tail goes before the head"
    assert len(manager.match_prefix(sequence([3] * 9))) == 2


def test_hash_covers_everything_before_the_block() -> None:
    manager = BlockManager(8, BLOCK)
    seq, _ = admit(manager, [1] * 4 + [2] * 4)
    manager.free(seq)
    assert manager.match_prefix(sequence([9] * 4 + [2] * 4 + [1])) == []


def test_hashes_are_keyed_so_collisions_cannot_be_prepared() -> None:
    hashes = []
    for _ in range(2):
        manager = BlockManager(4, BLOCK)
        seq, _ = admit(manager, [1] * 4)
        hashes.append(seq.block_hashes[0])
    assert hashes[0] != hashes[1]


def test_reset_prefix_cache_keeps_what_sequences_hold() -> None:
    manager = BlockManager(8, BLOCK)
    held, _ = admit(manager, [1] * 9, 1)
    freed, _ = admit(manager, [2] * 9, 2)
    manager.free(freed)
    manager.reset_prefix_cache()
    manager.check_invariants([held])
    assert manager.match_prefix(sequence([1] * 9)) == []
    assert manager.match_prefix(sequence([2] * 9)) == []
    manager.free(held)
    assert manager.num_free_blocks == 8
    manager.check_invariants([])


def test_freeing_twice_is_noticed() -> None:
    manager = BlockManager(4, BLOCK)
    seq, _ = admit(manager, [1] * 4)
    table = list(seq.block_table)
    manager.free(seq)
    seq.block_table = table
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(seq)


@settings(max_examples=80, deadline=None)
@given(
    st.integers(4, 24),
    st.booleans(),
    st.lists(
        st.one_of(
            st.tuples(st.just("admit"), st.lists(st.integers(1, 2), min_size=1, max_size=30)),
            st.tuples(st.just("grow"), st.integers(0, 9), st.integers(1, 6)),
            st.tuples(st.just("free"), st.integers(0, 9)),
        ),
        max_size=60,
    ),
)
def test_random_operations_keep_every_block_accounted_for(num_blocks: int, caching: bool, operations: list) -> None:
    manager = BlockManager(num_blocks, BLOCK, caching)
    live: list[Sequence] = []
    for number, operation in enumerate(operations):
        match operation:
            case ("admit", tokens):
                seq = sequence(tokens, number)
                hits = manager.match_prefix(seq)
                assert len(hits) * BLOCK < len(tokens)
                if manager.can_allocate(manager.blocks_for(len(tokens)) - len(hits), hits):
                    manager.allocate(seq, len(tokens), hits)
                    manager.publish(seq, seq.num_computed_tokens, len(tokens))
                    live.append(seq)
            case ("grow", which, count) if live:
                seq = live[which % len(live)]
                before = seq.num_tokens
                needed = manager.blocks_for(before + count) - len(seq.block_table)
                if manager.can_allocate(needed):
                    seq.token_ids.extend([1] * count)
                    manager.allocate(seq, seq.num_tokens)
                    manager.publish(seq, before, seq.num_tokens)
            case ("free", which) if live:
                manager.free(live.pop(which % len(live)))
        manager.check_invariants(live)
    for seq in live:
        manager.free(seq)
    manager.check_invariants([])
    assert manager.num_free_blocks == num_blocks
