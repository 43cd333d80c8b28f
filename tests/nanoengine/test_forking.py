"""Several sequences of one request: the prompt is computed once, its blocks are shared, and nobody sees another's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.block_manager import BlockManager
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, Sequence
from nanoengine.step import DEVICE_TO_DEVICE, Epoch
from tests.nanoengine.scheduler_driver import Driver, expected_output, output_name, prompt_of
from tests.nanoengine.test_scheduler import async_scheduling

__all__ = ["async_scheduling"]


def num_computed(driver: Driver) -> int:
    return sum(len(row.token_ids) for step in driver.steps for row in step.rows)


def expect_outputs(driver: Driver, name: str, prompt: list[int], n: int, num_tokens: int) -> None:
    for index in range(n):
        each = output_name(name, index)
        assert driver.tokens[each] == expected_output(prompt, num_tokens, index), each
        assert driver.finished[each] == "length"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 11, 12, 13, 37])
@pytest.mark.parametrize("max_tokens", [1, 6])
def test_prompt_is_computed_once_and_each_sequence_computes_its_last_token(
    async_scheduling: bool, caching: bool, length: int, max_tokens: int
) -> None:
    for budget in (5, 64):
        driver = Driver(async_scheduling, enable_prefix_caching=caching, max_num_batched_tokens=budget)
        driver.add("a", prompt_of(length), n=5, max_tokens=max_tokens)
        driver.run()
        expect_outputs(driver, "a", prompt_of(length), 5, max_tokens)
        assert num_computed(driver) == length - 1 + 5 * max_tokens
        copies = [copy for step in driver.steps for copy in step.copies]
        assert len(copies) == (4 if (length - 1) % 4 else 0), "a partly filled block is copied, a full one is shared"


def test_forked_sequences_share_the_full_blocks_of_their_prompt() -> None:
    driver = Driver()
    driver.add("a", prompt_of(23), n=4)
    driver.step()
    driver.step()
    tables = [seq.block_table for seq in driver.scheduler.running]
    assert len(tables) == 4
    assert all(table[:5] == tables[0][:5] for table in tables)
    assert len({table[5] for table in tables}) == 4
    assert 64 - driver.scheduler.blocks.num_free_blocks == 5 + 4
    metrics = driver.scheduler.blocks.num_query_tokens, driver.scheduler.blocks.num_hit_tokens
    assert metrics == (23, 0), "a fork asks nothing of the prefix cache"
    driver.run()


@pytest.mark.parametrize("budget", [1, 2, 7, 64])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "limits",
    [{"num_kv_blocks": 9}, {"max_num_seqs": 1}, {"max_num_seqs": 3, "policy": "priority"}, {"block_size": 1}],
)
def test_samples_do_not_depend_on_room(
    async_scheduling: bool, budget: int, caching: bool, limits: dict[str, Any]
) -> None:
    driver = Driver(async_scheduling, max_num_batched_tokens=budget, enable_prefix_caching=caching, **limits)
    for length in (1, 8, 14):
        driver.add(f"r{length}", prompt_of(length), n=4, max_tokens=9)
    driver.run()
    for length in (1, 8, 14):
        expect_outputs(driver, f"r{length}", prompt_of(length), 4, 9)
    if limits == {"num_kv_blocks": 9} and budget >= 7:
        assert driver.scheduler.num_preemptions > 0, "this test wants a cache that is too small"


def test_sequence_that_finds_no_row_forks_later_from_one_that_runs(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_num_seqs=2, enable_prefix_caching=False)
    driver.add("long", prompt_of(30), n=2, max_tokens=20)
    driver.add("other", prompt_of(3, 1), max_tokens=1)
    driver.add("later", prompt_of(30), n=3, max_tokens=5)
    driver.run()
    expect_outputs(driver, "long", prompt_of(30), 2, 20)
    expect_outputs(driver, "later", prompt_of(30), 3, 5)
    prefills = [row for step in driver.steps for row in step.rows if row.params is not None and row.num_computed_tokens]
    assert {row.num_computed_tokens for row in prefills} == {29}


def test_requests_that_wait_for_their_sibling_stand_in_nobodys_way() -> None:
    driver = Driver(max_num_batched_tokens=16, num_kv_blocks=256)
    driver.add("many", prompt_of(60), n=40, max_tokens=2)
    driver.add("other", prompt_of(6, 1), max_tokens=1)
    for _ in range(5):
        driver.step()
    assert driver.finished == {"other": "length"}
    driver.run()
    expect_outputs(driver, "many", prompt_of(60), 40, 2)


def test_preempted_sequence_takes_what_is_cached_of_its_own_output(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=20)
    prompt = prompt_of(6)
    driver.add("a", prompt, n=2, max_tokens=30)
    while len(driver.tokens["a[1]"]) < 20:
        driver.step()
    while driver.outputs:
        driver.commit_oldest()
    scheduler = driver.scheduler
    second = scheduler.running[1]
    known = second.num_tokens
    scheduler.preempt(second)
    step = driver.step()
    assert step is not None
    [resumed] = [row for row in step.rows if row.params is not None]
    assert resumed.num_computed_tokens >= known - 4, "more than the prompt that its sibling has"
    driver.run()
    expect_outputs(driver, "a", prompt, 2, 30)


@pytest.mark.parametrize("length", [5, 6, 8])
def test_running_sequence_can_be_forked_anywhere_as_beams_are(length: int) -> None:
    """Both go on in the block that they share: whoever is first copies it, and its workers' table follows."""
    driver = Driver()
    driver.add("a", prompt_of(length), max_tokens=12, presence_penalty=0.5)
    for _ in range(3):
        driver.step()
    scheduler = driver.scheduler
    [parent] = scheduler.running
    children = [parent.fork(100 + index, index) for index in (1, 2)]
    for child in children:
        scheduler.blocks.fork(parent, child)
        parent.request.seqs.append(child)
        scheduler.running.append(child)
        driver.tokens[output_name("a", child.index)] = list(parent.completion_token_ids)
    scheduler.check_invariants()
    start = list(parent.token_ids)
    step = driver.step()
    assert step is not None
    assert len(step.copies) == (2 if parent.num_computed_tokens % 4 != 1 else 0)
    driver.run()
    for index in range(3):
        want = [*start[length:], *expected_output(start, 12 - (len(start) - length), index)]
        assert driver.tokens[output_name("a", index)] == want


@pytest.mark.parametrize("steps", range(8))
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("index", [0, 2, None])
def test_abort_of_one_sequence_or_all_in_any_state_harms_no_other(
    async_scheduling: bool, steps: int, caching: bool, index: int | None
) -> None:
    driver = Driver(async_scheduling, max_num_batched_tokens=5, enable_prefix_caching=caching, max_num_seqs=3)
    driver.add("a", prompt_of(11), n=4, max_tokens=4)
    for _ in range(steps):
        driver.step()
    for _ in range(2):
        driver.abort("a", index=index)
    driver.run()
    for each in range(4):
        name, want = output_name("a", each), expected_output(prompt_of(11), 4, each)
        if index in (None, each) and driver.finished[name] == "abort":
            assert driver.tokens[name] == want[: len(driver.tokens[name])]
        else:
            assert driver.tokens[name] == want
    assert not driver.scheduler.requests


def test_each_sequence_goes_on_behind_its_own_journal(async_scheduling: bool) -> None:
    prompt = prompt_of(13)
    for caching in (True, False):
        driver = Driver(async_scheduling, enable_prefix_caching=caching, max_num_batched_tokens=7)
        journals = [expected_output(prompt, known, index) for index, known in enumerate((8, 0, 3, 8, 5))]
        driver.add("a", prompt, n=5, journals=journals, max_tokens=8)
        driver.run()
        expect_outputs(driver, "a", prompt, 5, 8)
        # Complete ones compute nothing, and nobody computes the prompt again.
        assert num_computed(driver) == 12 + 8 + (4 + 4) + (6 + 2)


def test_adding_twice_replays_each_sequence_from_its_journal() -> None:
    driver = Driver()
    prompt = prompt_of(5)
    driver.add("a", prompt, n=2)
    for _ in range(5):
        driver.step()
    journals = [expected_output(prompt, 1, 0), expected_output(prompt, 3, 1)]
    driver.add("a", prompt, n=2, journals=journals)
    assert driver.tokens["a"] == expected_output(prompt, 4)
    driver.run()
    expect_outputs(driver, "a", prompt, 2, 8)


def test_new_worker_group_prefills_and_forks_again(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, enable_prefix_caching=False)
    driver.add("a", prompt_of(14), n=3, max_tokens=6)
    for _ in range(4):
        driver.step()
    driver.new_epoch(Epoch(1, 2))
    driver.run()
    expect_outputs(driver, "a", prompt_of(14), 3, 6)
    again = [row for step in driver.steps for row in step.rows if step.epoch == Epoch(1, 2)]
    assert [row.num_computed_tokens for row in again if row.params is not None] == [0, 13, 13]


def test_request_that_is_refused_or_late_ends_for_each_sequence() -> None:
    driver = Driver()
    driver.add("refused", [5000], n=3)
    driver.add("late", prompt_of(9), n=3, timeout=1.0, max_tokens=50)
    driver.step()
    driver.now = 2.0
    driver.step()
    assert driver.finished == {output_name(name, i): "error" for name in ("refused", "late") for i in range(3)}
    driver.run()


def test_metrics_are_those_of_the_whole_request(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=10)
    driver.add("first", prompt_of(9), max_tokens=1)
    driver.run()
    driver.add("a", prompt_of(9), n=4, max_tokens=12)
    driver.run()
    expect_outputs(driver, "a", prompt_of(9), 4, 12)
    metrics = [driver.last[output_name("a", index)].metrics or {} for index in range(4)]
    assert {each["num_cached_tokens"] for each in metrics} == {8}, "the prompt's, not a late sequence's"
    assert max(each["num_preemptions"] for each in metrics) == driver.scheduler.num_preemptions > 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("add"),
                st.integers(1, 30),
                st.integers(0, 2),
                st.integers(1, 12),
                st.integers(1, 6),
                st.sampled_from(["", "x"]),
            ),
            st.tuples(st.just("abort"), st.integers(0, 20), st.sampled_from([None, 0, 1, 2, 5])),
            st.tuples(st.just("step"), st.integers(1, 6)),
            st.tuples(st.just("reset")),
            st.tuples(st.just("epoch")),
        ),
        max_size=40,
    ),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([12, 20, 64]),
    st.sampled_from([1, 4, 5]),
    st.sampled_from([2, 5, 16]),
    st.booleans(),
    st.booleans(),
)
def test_random_operations_keep_the_invariants_and_the_samples(
    operations: list[tuple], budget: int, num_blocks: int, block_size: int, rows: int, caching: bool, is_async: bool
) -> None:
    driver = Driver(
        is_async, max_num_batched_tokens=budget, num_kv_blocks=num_blocks, block_size=block_size, max_num_seqs=rows,
        enable_prefix_caching=caching,
    )  # fmt: skip
    asked: dict[str, list[int]] = {}
    num_requests = 0
    for operation in operations:
        match operation:
            case ("add", length, salt, max_tokens, n, cache_salt):
                prompt = prompt_of(length, salt)
                outputs = [expected_output(prompt, max_tokens, index) for index in range(n)]
                stops = outputs[0][2:3]  # that of the first sequence, and of whichever else comes by it
                for index, output in enumerate(outputs):
                    end = output.index(stops[0]) + 1 if stops and stops[0] in output else len(output)
                    asked[output_name(f"r{num_requests}", index)] = output[:end]
                options: dict[str, Any] = {"max_tokens": max_tokens, "n": n, "stop_token_ids": stops}
                driver.add(f"r{num_requests}", prompt, cache_salt=cache_salt, **options)
                num_requests += 1
            case _:
                driver.perform(operation)
    driver.run()
    assert set(driver.finished) == set(asked)
    for name, want in asked.items():
        got = driver.tokens[name]
        assert got == want[: len(got)]
        if driver.finished[name] == "stop":
            assert got == want


class Cells:
    """Sequences over a block manager that fork, write and end at will, and what really lies in their blocks."""

    def __init__(self, num_blocks: int, block_size: int, caching: bool) -> None:
        self.manager = BlockManager(num_blocks, block_size, caching)
        self.cells: dict[tuple[int, int], int] = {}
        self.live: list[Sequence] = []
        self.num_made = 0

    def start(self, tokens: list[int]) -> None:
        self.num_made += 1
        seq = Sequence(self.num_made, Request("r", [], SamplingParams(n=2)), 0, tokens)
        self.live.append(seq)
        self.write(seq)

    def fork(self, number: int, num_tokens: int) -> None:
        parent = self.live[number % len(self.live)]
        self.num_made += 1
        num_tokens = min(num_tokens, parent.num_computed_tokens)
        child = parent.fork(self.num_made, 1)
        del child.token_ids[num_tokens:]
        child.block_hashes.clear()
        self.manager.fork(parent, child, num_tokens)
        self.live.append(child)

    def write(self, seq: Sequence) -> None:
        """Compute all its tokens, or let it end where no block is left."""
        manager, start = self.manager, seq.num_computed_tokens
        hits = [] if seq.block_table else manager.match_prefix(seq)
        num_new = manager.num_new_blocks(seq, seq.num_tokens) - len(hits)
        if not manager.can_allocate(num_new, hits):
            self.end(seq)
            return
        free = manager.num_free_blocks
        unheld = sum(manager._ref_counts[block] == 0 for block in hits)
        manager.allocate(seq, seq.num_tokens, hits)
        assert manager.num_free_blocks >= free - num_new - unheld
        for direction, source, destination in manager.take_copies():
            assert direction == DEVICE_TO_DEVICE
            for offset in range(manager.block_size):
                self.cells[destination, offset] = self.cells.get((source, offset), -1)
        size, start = manager.block_size, max(start, seq.num_computed_tokens)
        for position in range(start, seq.num_tokens):
            self.cells[seq.block_table[position // size], position % size] = seq.token_ids[position]
        seq.num_computed_tokens = seq.num_tokens
        manager.publish(seq, start, seq.num_tokens)

    def end(self, seq: Sequence) -> None:
        self.manager.free(seq)
        self.live.remove(seq)

    def check(self) -> None:
        self.manager.check_invariants(self.live)
        size = self.manager.block_size
        for seq in self.live:
            lies = [self.cells[seq.block_table[p // size], p % size] for p in range(seq.num_computed_tokens)]
            assert lies == seq.token_ids[: seq.num_computed_tokens], f"somebody wrote into a block of {seq}"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.integers(1, 14), st.integers(0, 1)),
            st.tuples(st.just("fork"), st.integers(0, 9), st.integers(0, 20)),
            st.tuples(st.just("write"), st.integers(0, 9), st.integers(1, 6)),
            st.tuples(st.just("end"), st.integers(0, 9)),
        ),
        max_size=50,
    ),
    st.sampled_from([1, 3, 4]),
    st.sampled_from([8, 40]),
    st.booleans(),
)
def test_who_writes_into_a_shared_block_copies_it_first(
    operations: list[tuple], block_size: int, num_blocks: int, caching: bool
) -> None:
    cells = Cells(num_blocks, block_size, caching)
    for operation in operations:
        match operation:
            case ("start", length, salt):
                cells.start(prompt_of(length, salt))
            case ("fork", number, num_tokens) if cells.live:
                cells.fork(number, num_tokens)
            case ("write", number, count) if cells.live:
                seq = cells.live[number % len(cells.live)]
                seq.token_ids += [seq.seq_id * 100 + seq.num_tokens + i for i in range(count)]
                cells.write(seq)
            case ("end", number) if cells.live:
                cells.end(cells.live[number % len(cells.live)])
        cells.check()
    for seq in list(cells.live):
        cells.end(seq)
    cells.manager.check_invariants([])
    assert cells.manager.num_free_blocks == num_blocks


def test_parent_and_child_that_go_on_keep_one_copy_each_and_the_last_holder_keeps_the_block() -> None:
    cells = Cells(8, 4, caching=False)
    cells.start(prompt_of(6))
    cells.fork(0, 6)
    cells.fork(0, 6)
    tail = cells.live[0].block_table[1]
    for seq in list(cells.live):
        seq.num_sent_blocks = len(seq.block_table)
        seq.token_ids.append(100 + seq.seq_id)
        cells.write(seq)
        cells.check()
    assert [seq.block_table[1] == tail for seq in cells.live] == [False, False, True]
    assert [seq.num_sent_blocks for seq in cells.live] == [None, None, 2], "a table that changed travels anew"


def test_published_block_is_not_written_into_even_by_its_last_holder() -> None:
    cells = Cells(8, 4, caching=True)
    cells.start(prompt_of(8))
    cells.fork(0, 6)
    parent, child = cells.live
    cells.end(parent)
    child.token_ids += [700, 701]
    cells.write(child)
    cells.check()
    cells.start([*prompt_of(8), 9])
    assert cells.live[-1].block_table[1] != child.block_table[1], "the cached block still holds what its hash says"
    cells.check()
