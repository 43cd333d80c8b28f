"""The host tier and preemption by swapping, through the real scheduler: no token changes, nothing is lost or leaks."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.sequence import SequenceStatus
from nanoengine.step import DEVICE_TO_HOST, HOST_TO_DEVICE, Epoch
from tests.nanoengine.scheduler_driver import Driver, expected_output, output_name, prompt_of

both_modes = pytest.mark.parametrize("async_scheduling", [False, True])


def swapping(async_scheduling: bool, num_kv_blocks: int, num_host_blocks: int, **limits: object) -> Driver:
    return Driver(
        async_scheduling,
        num_kv_blocks=num_kv_blocks,
        num_host_blocks=num_host_blocks,
        preemption_mode="swap",
        **limits,
    )


def computed_tokens(driver: Driver) -> int:
    return sum(len(row.token_ids) for step in driver.steps for row in step.rows)


def copies(driver: Driver, direction: int) -> int:
    return sum(copy[0] == direction for step in driver.steps for copy in step.copies)


@both_modes
@pytest.mark.parametrize("caching", [True, False])
def test_swapped_sequence_goes_on_where_it_was_and_computes_nothing_twice(
    async_scheduling: bool, caching: bool
) -> None:
    driver = swapping(async_scheduling, 8, 16, enable_prefix_caching=caching)
    driver.add("old", prompt_of(8), max_tokens=16)
    driver.add("new", prompt_of(7, 1), max_tokens=16)
    driver.run()
    scheduler = driver.scheduler
    assert driver.tokens == {"old": expected_output(prompt_of(8), 16), "new": expected_output(prompt_of(7, 1), 16)}
    assert scheduler.num_swaps == scheduler.num_preemptions > 0
    metrics = driver.last["new"].metrics
    assert metrics is not None
    assert metrics["num_preemptions"] == scheduler.num_preemptions
    # Under overlap a row that a swapped sequence had in hand is not lost either.
    assert computed_tokens(driver) == 8 + 15 + 7 + 15
    assert scheduler.blocks.num_blocks_swapped_out == copies(driver, DEVICE_TO_HOST) > 0
    assert scheduler.blocks.num_blocks_swapped_in == copies(driver, HOST_TO_DEVICE) > 0
    assert scheduler.blocks.num_query_tokens == 15, "coming back is no query of the prefix cache"


@both_modes
def test_sequence_that_the_host_cannot_hold_is_computed_again(async_scheduling: bool) -> None:
    driver = swapping(async_scheduling, 8, 2)
    driver.add("old", prompt_of(8), max_tokens=16)
    driver.add("new", prompt_of(8, 1), max_tokens=16)
    driver.run()
    assert driver.tokens == {"old": expected_output(prompt_of(8), 16), "new": expected_output(prompt_of(8, 1), 16)}
    assert driver.scheduler.num_preemptions > 0
    assert driver.scheduler.num_swaps == 0


@both_modes
def test_partly_computed_prompt_is_swapped_and_goes_on_in_mid_block(async_scheduling: bool) -> None:
    driver = swapping(async_scheduling, 13, 16, max_num_batched_tokens=4)
    driver.add("old", prompt_of(6), max_tokens=30)
    for _ in range(3):
        driver.step()
    driver.add("long", prompt_of(36, 1), max_tokens=3)
    statuses = set()
    while driver.scheduler.has_work:
        driver.step()
        statuses |= {(seq.status, seq.num_computed_tokens % 4) for seq in driver.scheduler.waiting}
    driver.run()
    assert driver.tokens == {"old": expected_output(prompt_of(6), 30), "long": expected_output(prompt_of(36, 1), 3)}
    assert any(status is SequenceStatus.SWAPPED and rest for status, rest in statuses)
    assert computed_tokens(driver) == 6 + 29 + 36 + 2


@both_modes
def test_evicted_prefix_is_hit_on_the_host_and_copied_back(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=8, num_host_blocks=16)
    prompt = prompt_of(17)
    driver.add("first", prompt, max_tokens=3)
    driver.run()
    driver.add("other", prompt_of(25, 1), max_tokens=3)
    driver.run()
    assert copies(driver, DEVICE_TO_HOST) >= 3
    before = computed_tokens(driver)
    driver.add("again", prompt, max_tokens=3)
    driver.run()
    assert driver.tokens["again"] == expected_output(prompt, 3)
    assert computed_tokens(driver) - before == 1 + 2
    metrics = driver.last["again"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == 16
    blocks = driver.scheduler.blocks
    assert blocks.num_hit_tokens == 16
    assert 0 < blocks.num_host_hit_tokens <= 16
    assert blocks.num_host_hit_tokens == 4 * copies(driver, HOST_TO_DEVICE)


@both_modes
def test_prefix_that_is_copied_back_is_shared_at_once(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=12, num_host_blocks=16)
    prompt = prompt_of(16)
    driver.add("first", prompt, max_tokens=1)
    driver.run()
    driver.add("other", prompt_of(46, 1), max_tokens=1)
    driver.run()
    before = copies(driver, HOST_TO_DEVICE)
    for name in ("a", "b"):
        driver.add(name, [*prompt, 7 if name == "a" else 8], max_tokens=4)
    driver.run()
    assert copies(driver, HOST_TO_DEVICE) - before == 4, "the second hits what the first copies in the same step"
    for name in ("a", "b"):
        assert driver.tokens[name] == expected_output([*prompt, 7 if name == "a" else 8], 4)


@both_modes
def test_abort_deadline_and_new_group_free_what_swapped_sequences_hold(async_scheduling: bool) -> None:
    def swapped_out(timeout: float | None = None) -> Driver:
        driver = swapping(async_scheduling, 6, 16)
        driver.add("old", prompt_of(8), max_tokens=14)
        driver.add("new", prompt_of(8, 1), max_tokens=14, timeout=timeout)
        while not driver.scheduler.num_swaps:
            driver.step()
        assert driver.scheduler.blocks.host.num_free_blocks < 16
        return driver

    driver = swapped_out()
    driver.abort("new")
    driver.abort("new")
    driver.scheduler.check_invariants()
    assert driver.scheduler.blocks.host.num_free_blocks == 16
    driver.run()
    assert driver.finished == {"old": "length", "new": "abort"}

    driver = swapped_out(timeout=50)
    driver.now = 100.0
    driver.run()
    assert driver.finished == {"old": "length", "new": "error"}

    driver = swapped_out()
    driver.new_epoch(Epoch(1, 2))
    assert driver.scheduler.blocks.host.num_free_blocks == 16
    driver.run()
    assert driver.tokens == {"old": expected_output(prompt_of(8), 14), "new": expected_output(prompt_of(8, 1), 14)}


@both_modes
def test_reset_forgets_prefixes_on_the_host_but_not_swapped_sequences(async_scheduling: bool) -> None:
    driver = swapping(async_scheduling, 6, 16)
    driver.add("old", prompt_of(8), max_tokens=14)
    driver.add("new", prompt_of(8, 1), max_tokens=14)
    while not driver.scheduler.num_swaps:
        driver.step()
    driver.scheduler.blocks.reset_prefix_cache()
    driver.scheduler.check_invariants()
    assert driver.scheduler.blocks.host.num_cached_blocks == 0
    driver.run()
    assert driver.tokens["new"] == expected_output(prompt_of(8, 1), 14)
    driver.add("same", prompt_of(9, 1), max_tokens=1)
    driver.run()
    metrics = driver.last["same"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == 0, "what was computed before the reset came back with the swapped sequence"
    assert computed_tokens(driver) == 2 * (8 + 13) + 9


@both_modes
@pytest.mark.parametrize("num_host_blocks", [0, 6, 64])
def test_many_growing_sequences_do_not_thrash_and_the_oldest_progresses(
    async_scheduling: bool, num_host_blocks: int
) -> None:
    driver = swapping(async_scheduling, 24, num_host_blocks)
    number, length, max_tokens = 12, 9, 50
    for i in range(number):
        driver.add(f"r{i}", prompt_of(length, i), max_tokens=max_tokens)
    while driver.scheduler.has_work:
        oldest = driver.scheduler.running[0] if driver.scheduler.running else None
        before = oldest.num_computed_tokens if oldest else 0
        driver.step()
        if oldest is not None and not oldest.is_finished and not driver.scheduler._reaches_length(oldest):
            assert oldest.num_computed_tokens > before
    driver.run()
    for i in range(number):
        assert driver.tokens[f"r{i}"] == expected_output(prompt_of(length, i), max_tokens)
    assert driver.scheduler.num_preemptions <= 3 * number
    if num_host_blocks == 64:
        assert driver.scheduler.num_swaps == driver.scheduler.num_preemptions
        assert computed_tokens(driver) == number * (length + max_tokens - 1)


@both_modes
@pytest.mark.parametrize("caching", [True, False])
def test_forked_sequences_are_swapped_and_share_their_prompt_on_the_host(async_scheduling: bool, caching: bool) -> None:
    driver = swapping(async_scheduling, 20, 64, enable_prefix_caching=caching)
    prompt, n, max_tokens = prompt_of(27), 5, 24
    driver.add("a", prompt, n=n, max_tokens=max_tokens)
    most_held = 0
    while driver.scheduler.has_work:
        driver.step()
        swapped = [seq for seq in driver.scheduler.waiting if seq.status is SequenceStatus.SWAPPED]
        held = {block for seq in swapped for block in seq.host_blocks}
        if len(swapped) > 1:
            most_held = max(most_held, len(held) / sum(len(seq.host_blocks) for seq in swapped))
    driver.run()
    for index in range(n):
        assert driver.tokens[output_name("a", index)] == expected_output(prompt, max_tokens, index)
    assert driver.scheduler.num_swaps == driver.scheduler.num_preemptions > 1
    assert (most_held < 1) == caching, "the full blocks of a common prompt are known by their hash"
    assert computed_tokens(driver) == 26 + n * max_tokens


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(0, 2), st.integers(1, 30), st.integers(1, 4)),
            st.tuples(st.just("abort"), st.integers(0, 30), st.sampled_from([None, 0, 1])),
            st.tuples(st.just("step"), st.integers(1, 12)),
            st.tuples(st.just("reset")),
            st.tuples(st.just("epoch")),
        ),
        min_size=5,
        max_size=50,
    ),
    st.sampled_from([8, 64]),
    st.sampled_from([10, 14]),
    st.sampled_from([4, 16, 64]),
    st.sampled_from([3, 4]),
    st.booleans(),
    st.sampled_from(["swap", "swap", "recompute"]),
    st.booleans(),
)
def test_random_operations_on_two_tiers_keep_the_invariants_and_the_tokens(
    operations: list[tuple],
    budget: int,
    num_blocks: int,
    num_host_blocks: int,
    block_size: int,
    async_scheduling: bool,
    preemption_mode: str,
    caching: bool,
) -> None:
    driver = Driver(
        async_scheduling,
        max_num_batched_tokens=budget,
        num_kv_blocks=num_blocks,
        num_host_blocks=num_host_blocks,
        block_size=block_size,
        preemption_mode=preemption_mode,
        enable_prefix_caching=caching,
        max_num_seqs=5,
    )
    asked: dict[str, tuple[list[int], list[int]]] = {}
    num_requests = 0
    for operation in operations:
        match operation:
            case ("add", length, salt, max_tokens, n):
                prompt = prompt_of(length, salt)
                outputs = [expected_output(prompt, max_tokens, index) for index in range(n)]
                stops = outputs[0][2:3]  # a stop token that nobody knows ahead, or none
                for index, output in enumerate(outputs):
                    end = output.index(stops[0]) + 1 if stops and stops[0] in output else len(output)
                    asked[output_name(f"r{num_requests}", index)] = (prompt, output[:end])
                driver.add(f"r{num_requests}", prompt, max_tokens=max_tokens, n=n, stop_token_ids=stops)
                num_requests += 1
            case _:
                driver.perform(operation)
    driver.run()
    driver.check(asked, num_blocks * block_size)
