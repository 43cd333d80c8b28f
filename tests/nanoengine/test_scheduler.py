"""The scheduler under invented outputs: every test's name says what would be broken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.step import Epoch, StepOutput
from tests.nanoengine.scheduler_driver import EOS, Driver, expected_output, prompt_of


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def async_scheduling(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("budget", [1, 2, 7, 64])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("num_blocks", [12, 64])
def test_tokens_do_not_depend_on_budget_cache_or_preemption(
    async_scheduling: bool, budget: int, caching: bool, num_blocks: int
) -> None:
    driver = Driver(
        async_scheduling, max_num_batched_tokens=budget, enable_prefix_caching=caching, num_kv_blocks=num_blocks
    )
    prompts = {f"r{i}": prompt_of(3 + 4 * i, i % 2) for i in range(8)}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=10)
    driver.run()
    for name, prompt in prompts.items():
        assert driver.tokens[name] == expected_output(prompt, 10)
        assert driver.finished[name] == "length"
    if num_blocks == 12 and budget >= 7:
        assert driver.scheduler.num_preemptions > 0, "this test wants a cache that is too small"


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [1, 3])
def test_whole_prompt_cached_still_computes_its_last_token(async_scheduling: bool, blocks: int, extra: int) -> None:
    driver = Driver(async_scheduling)
    prompt = prompt_of(blocks * 4 + extra)
    for name in ("first", "second"):
        driver.add(name, prompt)
        driver.run()
    assert driver.tokens["first"] == driver.tokens["second"] == expected_output(prompt, 8)
    metrics = driver.last["second"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == (len(prompt) - 1) // 4 * 4


def test_prefix_is_not_hit_before_the_step_that_computes_it_returned(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling)
    prompt = prompt_of(16)
    driver.add("a", prompt)
    driver.add("b", prompt)
    step = driver.step()
    assert step is not None
    assert [row.num_computed_tokens for row in step.rows] == [0]
    driver.run()
    assert driver.tokens["a"] == driver.tokens["b"] == expected_output(prompt, 8)


@pytest.mark.parametrize("budget", [3, 16, 64])
def test_prefix_that_arrives_several_times_at_once_is_computed_once(async_scheduling: bool, budget: int) -> None:
    driver = Driver(async_scheduling, max_num_batched_tokens=budget, num_kv_blocks=256)
    shared = prompt_of(40)
    prompts = {f"r{i}": [*shared, 100 + i] for i in range(5)} | {"other": prompt_of(6, 1)}
    for name, prompt in prompts.items():
        driver.add(name, prompt, max_tokens=4)
    driver.run()
    assert all(driver.tokens[name] == expected_output(prompt, 4) for name, prompt in prompts.items())
    computed = sum(len(row.token_ids) for step in driver.steps for row in step.rows)
    assert computed == len(shared) + 5 * (1 + 3) + 6 + 3
    assert driver.scheduler.blocks.num_query_tokens == 5 * 41 + 6
    assert driver.scheduler.blocks.num_hit_tokens == 4 * 40
    # Who waits for a prefix stands in nobody's way.
    first = next(step for step in driver.steps if any(row.num_prompt_tokens == 6 for row in step.rows))
    assert budget == 3 or first.step_id <= 3


def test_who_waits_for_a_prefix_computes_it_when_the_other_leaves() -> None:
    driver = Driver(max_num_batched_tokens=4)
    driver.add("first", prompt_of(30))
    driver.add("second", prompt_of(30))
    driver.step()
    driver.step()
    driver.abort("first")
    driver.run()
    assert driver.tokens["second"] == expected_output(prompt_of(30), 8)
    metrics = driver.last["second"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == 8


def test_prefixes_of_different_salts_are_not_shared() -> None:
    driver = Driver()
    hits = {}
    for name, salt in (("none", ""), ("x", "x"), ("y", "y"), ("x again", "x"), ("none again", "")):
        driver.add(name, prompt_of(17), cache_salt=salt)
        driver.run()
        metrics = driver.last[name].metrics
        assert metrics is not None
        hits[name] = metrics["num_cached_tokens"]
    assert hits == {"none": 0, "x": 0, "y": 0, "x again": 16, "none again": 16}


def test_reset_prefix_cache_forgets_prefixes_and_disturbs_nothing_that_runs() -> None:
    driver = Driver()
    driver.add("runs", prompt_of(16), max_tokens=20)
    driver.step()
    driver.scheduler.blocks.reset_prefix_cache()
    driver.add("same", prompt_of(16), max_tokens=2)
    driver.run()
    assert driver.tokens["runs"] == expected_output(prompt_of(16), 20)
    metrics = driver.last["same"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == 0


def test_partial_prompt_is_never_sampled(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_num_batched_tokens=5)
    driver.add("a", prompt_of(11), max_tokens=2)
    driver.run()
    chunks = [(len(row.token_ids), row.sample) for step in driver.steps for row in step.rows]
    assert chunks == [(5, False), (5, False), (1, True), (1, True)]


def test_long_prompts_do_not_starve_a_running_stream() -> None:
    driver = Driver(max_num_batched_tokens=8, num_kv_blocks=256)
    driver.add("stream", prompt_of(4), max_tokens=20)
    driver.step()
    for i in range(10):
        driver.add(f"flood{i}", prompt_of(100, i), max_tokens=1)
    for _ in range(19):
        before = len(driver.tokens["stream"])
        driver.step()
        assert len(driver.tokens["stream"]) == before + 1
    driver.run()


def test_oldest_sequence_always_progresses_under_preemption() -> None:
    driver = Driver(num_kv_blocks=16, max_num_batched_tokens=32)
    for i in range(6):
        driver.add(f"r{i}", prompt_of(9, i), max_tokens=40)
    while driver.scheduler.has_work:
        oldest = driver.scheduler.running[0] if driver.scheduler.running else None
        before = oldest.num_computed_tokens if oldest else 0
        driver.step()
        if oldest is not None and not oldest.is_finished:
            assert oldest.num_computed_tokens > before
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    assert all(driver.tokens[f"r{i}"] == expected_output(prompt_of(9, i), 40) for i in range(6))
    # Thrashing would compute the same tokens again and again.
    computed = sum(len(row.token_ids) for step in driver.steps for row in step.rows)
    assert computed < 3 * 6 * 49


def test_lone_sequence_that_outgrows_the_cache_ends_with_length(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=3, max_model_len=200)
    driver.add("a", prompt_of(6), max_tokens=100)
    driver.run()
    assert driver.finished == {"a": "length"}
    assert driver.tokens["a"] == expected_output(prompt_of(6), 7)  # 12 slots, and the token after the last of them


def test_prompt_that_can_never_fit_is_refused_and_harms_nobody(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=4)
    driver.add("fits", prompt_of(6), max_tokens=3)
    driver.add("never", prompt_of(16))
    driver.run()
    assert driver.finished == {"fits": "length", "never": "error"}
    error = driver.last["never"].error
    assert error is not None
    assert "17 tokens" in error["message"]
    assert "16 tokens" in error["message"]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "at least 1 token"), ([5] * 256, "at most 255"), ([5, 1000], "0 to 999, got 1000"), ([-1], "got -1")],
)
def test_impossible_prompt_is_refused_with_a_message(prompt: list[int], words: str) -> None:
    driver = Driver()
    driver.add("bad", prompt)
    assert driver.finished == {"bad": "error"}
    error = driver.last["bad"].error
    assert error is not None
    assert error["kind"] == "RequestError"
    assert words in error["message"]
    assert not driver.scheduler.has_work


def test_generation_stops_at_max_model_len(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_model_len=20)
    driver.add("a", prompt_of(17), max_tokens=None)
    driver.run()
    assert driver.finished == {"a": "length"}
    assert len(driver.tokens["a"]) == 3


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_eos_and_stop_ids_end_a_sequence_once(async_scheduling: bool, ignore_eos: bool) -> None:
    driver = Driver(async_scheduling)
    prompt = prompt_of(5)
    third = expected_output(prompt, 3)[2]
    driver.add("stop", prompt, stop_token_ids=[third], ignore_eos=ignore_eos)
    driver.run()
    assert driver.tokens["stop"] == expected_output(prompt, 3)
    assert driver.finished["stop"] == "stop"
    assert driver.last["stop"].stop_reason == third


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_eos_is_honoured_unless_ignored(ignore_eos: bool) -> None:
    driver = Driver()
    driver.add("a", prompt_of(5), ignore_eos=ignore_eos, max_tokens=2)
    step = driver.scheduler.schedule()
    assert step is not None
    driver.scheduler.commit(StepOutput(step.epoch, step.step_id, [step.rows[0].seq_id], [[EOS]]))
    driver.receive()
    assert driver.finished.get("a") == (None if ignore_eos else "stop")
    assert driver.tokens["a"] == [EOS]
    assert driver.last["a"].stop_reason is None


def test_resumed_sequence_counts_max_tokens_from_its_prompt(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=8)
    driver.add("old", prompt_of(8), max_tokens=16)
    driver.add("new", prompt_of(8, 1), max_tokens=16)
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    assert driver.tokens["new"] == expected_output(prompt_of(8, 1), 16)


def test_abort_in_each_state_twice_and_for_an_unknown_id(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_num_seqs=1)
    driver.add("running", prompt_of(5), max_tokens=50)
    driver.add("waiting", prompt_of(5, 1), max_tokens=50)
    driver.step()
    for name in ("waiting", "running", "unknown"):
        driver.abort(name)
        driver.abort(name)
    assert driver.finished == {"waiting": "abort", "running": "abort"}
    driver.run()


def test_abort_while_its_step_is_in_flight_frees_once_and_discards_the_row() -> None:
    driver = Driver()
    driver.add("a", prompt_of(5), max_tokens=50)
    driver.add("b", prompt_of(5, 1), max_tokens=5)
    step = driver.scheduler.schedule()
    assert step is not None
    output = driver.workers.run(step)
    driver.abort("a")
    driver.scheduler.check_invariants()
    driver.scheduler.commit(output)
    driver.receive()
    assert driver.tokens["a"] == []
    assert len(driver.tokens["b"]) == 1
    driver.run()
    assert driver.tokens["b"] == expected_output(prompt_of(5, 1), 5)


def test_adding_twice_replays_what_the_journal_lacks() -> None:
    driver = Driver()
    prompt = prompt_of(5)
    driver.add("a", prompt, max_tokens=8)
    for _ in range(4):
        driver.step()
    assert len(driver.tokens["a"]) == 4
    driver.add("a", prompt, journal=expected_output(prompt, 2), max_tokens=8)  # two deltas got lost
    assert driver.tokens["a"] == expected_output(prompt, 4)
    driver.run()
    assert driver.tokens["a"] == expected_output(prompt, 8)


def test_journal_of_a_lost_scheduler_is_continued_not_repeated(async_scheduling: bool) -> None:
    prompt = prompt_of(9)
    driver = Driver(async_scheduling)
    driver.add("a", prompt, journal=expected_output(prompt, 5), max_tokens=8)
    driver.run()
    assert driver.tokens["a"] == expected_output(prompt, 8)


def test_complete_journal_only_gets_its_end() -> None:
    prompt = prompt_of(9)
    driver = Driver()
    driver.add("a", prompt, journal=expected_output(prompt, 8), max_tokens=8)
    assert driver.finished == {"a": "length"}
    assert driver.tokens["a"] == expected_output(prompt, 8)


def test_new_worker_group_forgets_every_hash_and_computes_again(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling)
    shared = prompt_of(16)
    driver.add("cached", shared, max_tokens=2)
    driver.run()
    driver.add("a", shared, max_tokens=8)
    for _ in range(3):
        driver.step()
    if not driver.outputs:
        lost = driver.scheduler.schedule()
        assert lost is not None
        driver.outputs.append(driver.workers.run(lost))
    driver.new_epoch(Epoch(1, 2))  # and the output of the older one is dropped
    driver.run()
    assert driver.tokens["a"] == expected_output(shared, 8)
    resumed = next(step for step in driver.steps if step.epoch == Epoch(1, 2))
    assert resumed.rows[0].num_computed_tokens == 0
    assert resumed.rows[0].params is not None


def test_steady_decode_message_does_not_grow_with_the_context() -> None:
    driver = Driver(max_model_len=4096, num_kv_blocks=1024, max_num_batched_tokens=4096, block_size=16)
    driver.add("short", prompt_of(15), max_tokens=None)
    driver.add("long", prompt_of(3000), max_tokens=None)
    driver.step()
    sizes = []
    for _ in range(20):
        step = driver.step()
        assert step is not None
        assert all(row.params is None and len(row.token_ids) == 1 for row in step.rows)
        sizes.append(len(step.pack()))
    assert max(sizes) < 200


def test_finished_rows_are_named_to_the_workers_and_batches_keep_arrival_order(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling)
    for i in range(5):
        driver.add(f"r{i}", prompt_of(4, i), max_tokens=1 + i)
    driver.run()
    assert driver.workers.tables == {}
    for step in driver.steps:
        ids = [row.seq_id for row in step.rows]
        assert ids == sorted(ids)


def test_same_request_id_of_two_clients_are_two_requests() -> None:
    driver = Driver()
    driver.add("x", prompt_of(4), client="a", max_tokens=1)
    driver.add("x", prompt_of(4), client="b", max_tokens=1)
    assert len(driver.scheduler.requests) == 2
    driver.scheduler.abort_client("a")
    assert [key[0] for key in driver.scheduler.requests] == ["b"]


def test_prompts_are_not_split_when_chunked_prefill_is_off(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, enable_chunked_prefill=False, max_num_batched_tokens=256)
    for i in range(4):
        driver.add(f"r{i}", prompt_of(100, i), max_tokens=3)
    driver.run()
    prefills = [len(row.token_ids) for step in driver.steps for row in step.rows if row.params is not None]
    assert prefills == [100] * 4


@settings(max_examples=120, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(0, 2), st.integers(1, 30), st.integers(0, 20)),
            st.tuples(st.just("abort"), st.integers(0, 30)),
            st.tuples(st.just("step"), st.integers(1, 6)),
            st.tuples(st.just("epoch")),
        ),
        max_size=60,
    ),
    st.sampled_from([1, 3, 8, 64]),
    st.sampled_from([12, 20, 64]),
    st.sampled_from([1, 4, 5]),
    st.booleans(),
)
def test_random_operations_keep_the_invariants_and_the_tokens(
    operations: list[tuple], budget: int, num_blocks: int, block_size: int, async_scheduling: bool
) -> None:
    driver = Driver(
        async_scheduling, max_num_batched_tokens=budget, num_kv_blocks=num_blocks, block_size=block_size, max_num_seqs=5
    )
    asked: dict[str, tuple[list[int], list[int]]] = {}
    for operation in operations:
        match operation:
            case ("add", length, salt, max_tokens, stop_at):
                name, prompt = f"r{len(asked)}", prompt_of(length, salt)
                want = expected_output(prompt, max_tokens)
                stops = want[stop_at : stop_at + 1]  # a stop token that nobody knows ahead, or none
                asked[name] = (prompt, want[: want.index(stops[0]) + 1] if stops else want)
                driver.add(name, prompt, max_tokens=max_tokens, stop_token_ids=stops)
            case _:
                driver.perform(operation)
    driver.run()
    driver.check(asked, num_blocks * block_size)
