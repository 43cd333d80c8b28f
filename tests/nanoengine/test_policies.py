"""In what order requests are served, and when they have to be complete, under a clock that stands still."""

from __future__ import annotations

import pytest

from nanoengine.admission import AGEING_SECONDS
from nanoengine.step import Epoch
from tests.nanoengine.scheduler_driver import Driver, expected_output, prompt_of


def order_of_ends(driver: Driver) -> list[str]:
    driver.run()
    return list(driver.finished)


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_priority_is_the_order_only_where_it_is_asked_for(policy: str) -> None:
    driver = Driver(policy=policy, max_num_seqs=1)
    for name, priority in (("low", 5), ("high", -5), ("middle", 0), ("middle, too", 0)):
        driver.add(name, prompt_of(5), priority=priority, max_tokens=2)
    expected = ["low", "high", "middle", "middle, too"]
    assert order_of_ends(driver) == (expected if policy == "fcfs" else [*expected[1:], "low"])


def test_low_priority_is_served_in_the_end_while_better_ones_keep_coming() -> None:
    driver = Driver(policy="priority", max_num_seqs=1, num_kv_blocks=256)
    driver.add("low", prompt_of(5), priority=3, max_tokens=1)
    for i in range(100):
        driver.add(f"high{i}", prompt_of(5, i), max_tokens=1)
        driver.step()
        driver.now += 1.0
        if "low" in driver.finished:
            break
    assert driver.now == pytest.approx(3 * AGEING_SECONDS, abs=2)
    driver.run()


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_lower_priority_gives_way_when_blocks_run_out(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, policy="priority", num_kv_blocks=8)
    driver.add("low", prompt_of(8), priority=1, max_tokens=16)
    driver.step()
    driver.add("high", prompt_of(8, 1), priority=0, max_tokens=16)
    driver.run()
    assert list(driver.finished) == ["high", "low"]
    assert driver.last["high"].metrics is not None
    assert driver.last["low"].metrics is not None
    assert driver.last["high"].metrics["num_preemptions"] == 0
    assert driver.last["low"].metrics["num_preemptions"] > 0
    assert driver.tokens["low"] == expected_output(prompt_of(8), 16)


def test_new_worker_group_keeps_the_order() -> None:
    driver = Driver(policy="priority", max_num_seqs=2)
    for i, priority in enumerate((3, 2, 1, 0)):
        driver.add(f"r{priority}", prompt_of(4, i), priority=priority, max_tokens=3)
    driver.step()
    driver.new_epoch(Epoch(1, 2))
    assert order_of_ends(driver) == ["r0", "r1", "r2", "r3"]


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_deadline_ends_a_request_wherever_it_stands_and_frees_its_blocks(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_num_seqs=2)
    driver.add("runs", prompt_of(5), max_tokens=100, timeout=2.0)
    driver.add("goes on", prompt_of(5, 1), max_tokens=20)
    driver.add("waits", prompt_of(5, 2), max_tokens=5, timeout=1.5)
    driver.add("in time", prompt_of(5, 3), max_tokens=1, timeout=100.0)
    for _ in range(5):
        driver.step()
        driver.now += 0.5
    assert driver.finished.items() >= {("runs", "error"), ("waits", "error")}
    for name, seconds in (("runs", "2 s"), ("waits", "1.5 s")):
        error = driver.last[name].error
        assert error is not None
        assert error["kind"] == "RequestTimeoutError"
        assert seconds in error["message"]
    assert 0 < len(driver.tokens["runs"]) <= 4
    driver.run()
    assert driver.tokens["goes on"] == expected_output(prompt_of(5, 1), 20)
    assert driver.finished["in time"] == "length"


def test_queue_time_is_measured_until_the_first_step_that_computes() -> None:
    driver = Driver(max_num_seqs=1)
    driver.add("first", prompt_of(5), max_tokens=3)
    driver.add("second", prompt_of(5, 1), max_tokens=1)
    driver.add("never", prompt_of(5, 2), max_tokens=1)
    for _ in range(4):
        driver.step()
        driver.now += 1.0
    driver.abort("never")
    queued = {name: delta.metrics["queue_seconds"] for name, delta in driver.last.items() if delta.metrics}
    assert queued == {"first": 0.0, "second": 3.0, "never": 4.0}
