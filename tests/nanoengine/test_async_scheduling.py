"""Two steps in flight: what is scheduled before the step in front of it is known must neither show nor leak."""

from __future__ import annotations

from nanoengine.step import PREVIOUS_SAMPLE, StepInput, StepOutput
from tests.nanoengine.scheduler_driver import Driver, expected_output, prompt_of


def start(driver: Driver) -> tuple[StepInput, StepOutput]:
    """Schedule and compute a step, and leave it in flight."""
    step = driver.scheduler.schedule()
    assert step is not None
    driver.scheduler.check_invariants()
    return step, driver.workers.run(step)


def commit(driver: Driver, output: StepOutput) -> None:
    driver.scheduler.commit(output)
    driver.scheduler.check_invariants()
    driver.receive()


def finish(driver: Driver, *outputs: StepOutput) -> None:
    """Commit what is in flight and run to the end."""
    for output in outputs:
        commit(driver, output)
    driver.run()


def test_next_step_is_scheduled_before_the_token_is_known() -> None:
    driver = Driver(True)
    driver.add("a", prompt_of(5), max_tokens=3)
    _, first = start(driver)
    step, second = start(driver)
    assert [(row.token_ids, row.num_computed_tokens, row.sample) for row in step.rows] == [([PREVIOUS_SAMPLE], 5, True)]
    assert driver.tokens["a"] == []
    finish(driver, first, second)
    assert driver.tokens["a"] == expected_output(prompt_of(5), 3)


def test_nothing_is_scheduled_beyond_a_length_that_is_known_ahead() -> None:
    for limits, max_tokens, length in (({}, 2, 2), ({"max_model_len": 8}, None, 3), ({}, 1, 1)):
        driver = Driver(True, **limits)
        driver.add("a", prompt_of(5), max_tokens=max_tokens)
        driver.run()
        assert driver.tokens["a"] == expected_output(prompt_of(5), length)
        assert sum(len(row.token_ids) for step in driver.steps for row in step.rows) == 5 + length - 1


def test_row_behind_a_stop_token_is_discarded_and_its_block_serves_another() -> None:
    driver = Driver(True, num_kv_blocks=3, enable_prefix_caching=False)
    prompt = prompt_of(7)
    driver.add("stops", prompt, max_tokens=20, stop_token_ids=[expected_output(prompt, 2)[1]])
    driver.add("waits", prompt_of(9, 1), max_tokens=2)
    _, first = start(driver)
    _, second = start(driver)
    commit(driver, first)
    _, behind = start(driver)  # writes into a block that the next commit frees
    commit(driver, second)
    assert driver.finished == {"stops": "stop"}
    _, taken_over = start(driver)
    finish(driver, behind, taken_over)
    assert driver.tokens["stops"] == expected_output(prompt, 2)
    assert driver.tokens["waits"] == expected_output(prompt_of(9, 1), 2)


def test_abort_with_two_rows_in_flight_discards_both_and_frees_once() -> None:
    driver = Driver(True)
    driver.add("a", prompt_of(5), max_tokens=50)
    driver.add("b", prompt_of(5, 1), max_tokens=5)
    _, first = start(driver)
    _, second = start(driver)
    driver.abort("a")
    driver.scheduler.check_invariants()
    finish(driver, first, second)
    assert driver.tokens["a"] == []
    assert driver.tokens["b"] == expected_output(prompt_of(5, 1), 5)


def test_sequence_preempted_with_a_row_in_flight_keeps_its_token_and_waits_for_it() -> None:
    driver = Driver(True, num_kv_blocks=5)
    driver.add("old", prompt_of(8), max_tokens=8)
    driver.add("new", prompt_of(7, 1), max_tokens=8)
    outputs = [start(driver)[1]]
    while not driver.scheduler.num_preemptions:
        outputs.append(start(driver)[1])
        if not driver.scheduler.num_preemptions:
            commit(driver, outputs.pop(0))
    (preempted,) = driver.scheduler.waiting
    assert preempted.num_pending_tokens == 1
    known = preempted.num_completion_tokens
    commit(driver, outputs.pop(0))
    assert preempted.num_completion_tokens == known + 1
    finish(driver, *outputs)
    assert driver.tokens["new"] == expected_output(prompt_of(7, 1), 8)
    assert driver.tokens["old"] == expected_output(prompt_of(8), 8)


def test_sequence_that_ends_in_flight_is_preempted_and_still_ends_once() -> None:
    driver = Driver(True, num_kv_blocks=4, max_num_seqs=2)
    driver.add("old", prompt_of(4), max_tokens=12)
    driver.add("new", prompt_of(7, 1), max_tokens=2)
    driver.run()
    assert driver.tokens["old"] == expected_output(prompt_of(4), 12)
    assert driver.tokens["new"] == expected_output(prompt_of(7, 1), 2)
    assert driver.finished == {"old": "length", "new": "length"}


def test_both_modes_end_alike_when_the_cache_is_outgrown() -> None:
    ends = []
    for async_scheduling in (False, True):
        driver = Driver(async_scheduling, num_kv_blocks=3)
        for i in range(3):
            driver.add(f"r{i}", prompt_of(4 + i, i), max_tokens=30)
        driver.run()
        ends.append((driver.tokens, driver.finished))
    assert ends[0] == ends[1]
    assert len(ends[0][0]["r0"]) == 9


def test_block_that_decoding_filled_is_hit_only_when_its_tokens_are_known() -> None:
    driver = Driver(True)
    prompt = prompt_of(6)
    driver.add("a", prompt, max_tokens=20)
    for _ in range(8):
        driver.step()
    known = prompt + driver.tokens["a"]
    driver.add("b", known, max_tokens=4)
    driver.run()
    metrics = driver.last["b"].metrics
    assert metrics is not None
    assert metrics["num_cached_tokens"] == (len(known) - 1) // 4 * 4
    assert driver.tokens["b"] == expected_output(known, 4)
