"""What a watcher is shown: exact counts, a bounded map, shared prefixes, and nothing that nobody asked for."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.engine_state import FULL, MAX_CELLS, MAX_ROWS, engine_state, map_blocks
from nanoengine.engine_view import MAX_RECENT, RECENT_SECONDS, Observer, Percentiles
from nanoengine.journal import RequestJournal
from nanoengine.messages import BlockMap, EngineState, decode, encode
from nanoengine.sampling_params import SamplingParams
from tests.nanoengine.scheduler_driver import Driver


def state_of(driver: Driver) -> EngineState:
    state = engine_state(driver.scheduler, 1, driver.now)
    assert decode(encode(state)) == state
    return state


def prompt_of(length: int, first: int = 10) -> list[int]:
    return [first + i % 900 for i in range(length)]


def count(level: int, per_cell: int) -> int:
    """What the page makes of a level."""
    return level * per_cell // FULL


# --- the map ---


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 800), st.randoms(use_true_random=False))
def test_map_counts_every_block_exactly_once(num_blocks: int, draw: random.Random) -> None:
    ref_counts = [draw.choice([0, 0, 1, 2, 300]) for _ in range(num_blocks)]
    cached = {block: None for block, refs in enumerate(ref_counts) if refs == 0 and draw.random() < 0.5}
    found = map_blocks(ref_counts, cached.keys())
    assert (found.num_cached, found.num_held) == (len(cached), ref_counts.count(1))
    assert found.num_shared == sum(refs > 1 for refs in ref_counts)
    assert len(found.held) == len(found.shared) == len(found.cached) == -(-found.num_mapped // found.blocks_per_cell)
    assert all(refs == 0 for refs in ref_counts[found.num_mapped :])
    assert found.blocks_per_cell == 1
    for block, refs in enumerate(ref_counts[: found.num_mapped]):
        assert (found.held[block] == FULL) == (refs == 1)
        assert (found.shared[block] == FULL) == (refs > 1)
        assert (found.cached[block] == FULL) == (block in cached)


@pytest.mark.parametrize("num_blocks", [0, 1, 511, 4096, 4097, 65536, 1_500_000])
def test_map_is_bounded_and_its_cells_tell_exact_counts(num_blocks: int) -> None:
    ref_counts = [1 if block % 3 == 0 else 0 for block in range(num_blocks)]
    found = map_blocks(ref_counts, ())
    assert len(found.held) <= MAX_CELLS
    if 0 < found.blocks_per_cell <= FULL:
        told = sum(count(level, found.blocks_per_cell) for level in found.held)
        assert told == found.num_held == ref_counts.count(1)


def test_one_block_in_a_large_cache_is_shown_by_itself() -> None:
    ref_counts = [0] * 100_000
    ref_counts[700] = 1
    found = map_blocks(ref_counts, ())
    assert (found.num_blocks, found.num_mapped, found.blocks_per_cell) == (100_000, 1024, 1)
    assert [cell for cell, level in enumerate(found.held) if level] == [700]


def test_an_idle_engine_has_nothing_but_free_blocks() -> None:
    state = state_of(Driver())
    assert state.device == BlockMap(64, 64, 1, 0, 0, 0, bytes(64), bytes(64), bytes(64))
    assert state.host.num_blocks == 0
    assert not state.rows
    assert not state.prefixes


# --- sequences and prefixes ---


def test_sequences_are_told_with_their_counters_in_serving_order() -> None:
    driver = Driver(max_num_seqs=2)
    for name, length in (("a", 10), ("b", 7), ("c", 5)):
        driver.add(name, prompt_of(length, 10 * length), max_tokens=30)
    for _ in range(4):
        driver.step()
    driver.now = 2.5
    state = state_of(driver)
    assert (state.num_running, state.num_waiting, state.num_swapped) == (2, 1, 0)
    assert [(row.request_id, row.status, row.num_prompt_tokens) for row in state.rows] == [
        ("a", "running", 10),
        ("b", "running", 7),
        ("c", "waiting", 5),
    ]
    assert [row.num_completion_tokens for row in state.rows] == [len(driver.tokens[name]) for name in "abc"]
    assert [row.age for row in state.rows] == [2.5, 2.5, 2.5]
    assert sum(row.num_blocks for row in state.rows) == state.device.num_held


@pytest.mark.parametrize("how", ["length", "abort", "preempted"])
def test_generated_tokens_are_never_lost_from_the_total(how: str) -> None:
    driver = Driver(num_kv_blocks=12 if how == "preempted" else 64)
    for name in ("a", "b", "c"):
        driver.add(name, prompt_of(9, ord(name)), max_tokens=20)
    last = 0
    while driver.scheduler.has_work:
        driver.step()
        if how == "abort" and len(driver.tokens["b"]) == 5:
            driver.abort("b")
        total = state_of(driver).num_generated_tokens
        assert total == sum(len(tokens) for tokens in driver.tokens.values())
        assert total >= last
        last = total
    assert (driver.scheduler.num_preemptions > 0) == (how == "preempted")


def test_prefixes_that_running_sequences_share_are_told_with_what_they_save() -> None:
    driver = Driver(num_kv_blocks=128)
    common, other = prompt_of(16), prompt_of(8, 500)
    for name, prompt in (("a", common), ("d", other)):
        driver.add(name, [*prompt, 3], max_tokens=40)
    driver.step()
    for name, prompt in (("b", common), ("c", common), ("e", other), ("f", prompt_of(16, 700))):
        driver.add(name, [*prompt, 4, 5, ord(name)], max_tokens=40)
    driver.step()
    state = state_of(driver)
    found = [(each.num_seqs, each.num_blocks, each.num_saved) for each in state.prefixes]
    assert found == [(3, 4, 8), (2, 2, 2)]
    assert state.device.num_shared == 6
    shared = {row.request_id: row.num_shared_blocks for row in state.rows}
    assert shared == {"a": 4, "b": 4, "c": 4, "d": 2, "e": 2, "f": 0}
    assert state.prefix_cells.count(1) == 4
    assert state.prefix_cells.count(2) == 2
    assert all(bool(state.prefix_cells[i]) == bool(state.device.shared[i]) for i in range(len(state.prefix_cells)))
    assert [each.root for each in state.prefixes] == [state.prefix_cells.index(1), state.prefix_cells.index(2)]


def test_branches_of_a_prefix_belong_to_it() -> None:
    driver = Driver(num_kv_blocks=128)
    stem = prompt_of(8)
    left, right = [*stem, *prompt_of(8, 300)], [*stem, *prompt_of(8, 600)]
    driver.add("stem", [*stem, 3], max_tokens=60)
    driver.step()
    for name, prompt in (("l1", left), ("r1", right)):
        driver.add(name, [*prompt, 4], max_tokens=60)
    driver.step()
    for name, prompt in (("l2", left), ("r2", right)):
        driver.add(name, [*prompt, 5], max_tokens=60)
    driver.step()
    (prefix,) = state_of(driver).prefixes
    # 2 blocks of the stem in 5 tables, and 2 of each branch in 2.
    assert (prefix.num_seqs, prefix.num_blocks, prefix.num_saved) == (5, 6, 2 * 4 + 4)


def test_choices_of_one_request_share_its_prompt() -> None:
    driver = Driver()
    driver.add("a", prompt_of(23), n=4, max_tokens=20)
    for _ in range(3):
        driver.step()
    state = state_of(driver)
    (prefix,) = state.prefixes
    assert (prefix.num_seqs, prefix.num_blocks, prefix.num_saved) == (4, 5, 15)
    assert [row.output_index for row in state.rows] == [0, 1, 2, 3]


def test_rows_are_bounded() -> None:
    driver = Driver(max_num_seqs=8, num_kv_blocks=512)
    for number in range(3 * MAX_ROWS):
        driver.add(str(number), prompt_of(5, number), max_tokens=4)
    driver.step()
    state = state_of(driver)
    assert len(state.rows) == MAX_ROWS
    assert state.num_running + state.num_waiting == 3 * MAX_ROWS
    assert [row.status for row in state.rows[:9]] == ["running"] * 8 + ["waiting"]


def test_what_is_swapped_out_is_told_with_its_host_blocks() -> None:
    driver = Driver(num_kv_blocks=12, num_host_blocks=32, preemption_mode="swap")
    for name in ("a", "b", "c"):
        driver.add(name, prompt_of(9, ord(name)), max_tokens=20)
    seen = []
    while driver.scheduler.has_work:
        driver.step()
        state = state_of(driver)
        seen.append(state.num_swapped)
        swapped = [row.request_id for row in state.rows if row.status == "swapped"]
        assert len(swapped) == state.num_swapped
        assert state.host.num_blocks == 32
        assert (state.host.num_held + state.host.num_shared > 0) == bool(swapped)
    assert max(seen) > 0


def test_looking_changes_nothing() -> None:
    def run(looks: bool) -> tuple[Any, ...]:
        driver = Driver(num_kv_blocks=20)
        for number in range(6):
            driver.add(str(number), prompt_of(5 + number, 10 * (number % 2)), max_tokens=15)
        while driver.scheduler.has_work:
            driver.step()
            if looks:
                state_of(driver)
        return driver.tokens, [step.pack() for step in driver.steps]

    assert run(True) == run(False)


# --- latencies ---


def journal_of(
    arrival: float, first: float | None = None, last: float | None = None, tokens: int = 0
) -> RequestJournal:
    journal = RequestJournal("r", "r.0", None, [1], SamplingParams(), 16, 0, 0, arrival, None)
    journal.metrics.first_token_time, journal.metrics.last_token_time = first, last
    journal.sequences[0].append([5] * tokens)
    return journal


def test_percentiles_are_values_that_occurred() -> None:
    assert Percentiles.of([]) == Percentiles(0, None, None)
    assert Percentiles.of([3.0]) == Percentiles(1, 3.0, 3.0)
    assert Percentiles.of(range(1, 11)) == Percentiles(10, 5, 9)


def test_latencies_are_those_of_recent_and_of_open_requests() -> None:
    now = 1000.0
    still_open = [journal_of(990, 991, 993, 3), journal_of(999)]
    observer = Observer(still_open, lambda: now)
    for ended, ttft in ((now - RECENT_SECONDS - 1, 50.0), (now - 1, 3.0)):
        journal = journal_of(900, 900 + ttft, 900 + ttft, 1)
        journal.metrics.finished_time = ended
        observer.ended(journal)
    found = observer.latencies()
    assert found.ttft == Percentiles(2, 1.0, 3.0), "the one that ended long ago and the one without tokens are left out"
    assert found.tpot == Percentiles(1, 1.0, 1.0)
    for _ in range(2 * MAX_RECENT):
        observer.ended(still_open[0])
    assert len(observer._ended) == MAX_RECENT
