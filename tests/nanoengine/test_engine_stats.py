"""What the scheduler counts, when front ends hear of it, and the status line."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from nanoengine.engine_stats import (
    REPORT_SECONDS,
    SETTLE_SECONDS,
    STEP_TOKEN_BOUNDS,
    PastTotals,
    ReportTimes,
    StatusLine,
    engine_stats,
    totals_of,
)
from nanoengine.messages import TOTALS, Stats, decode, encode
from nanoengine.recovery import RecoveryStats
from tests.nanoengine.scheduler_driver import EOS, Driver, prompt_of

both_modes = pytest.mark.parametrize("async_scheduling", [False, True])


def stats_of(driver: Driver) -> Stats:
    stats = engine_stats(driver.scheduler, 7, RecoveryStats(), 0)
    assert decode(encode(stats)) == stats
    return stats


@both_modes
def test_totals_are_what_the_clients_got_and_the_workers_computed(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, max_num_batched_tokens=16)
    driver.add("a", prompt_of(30), max_tokens=20)
    driver.add("b", prompt_of(9, 1), max_tokens=7, n=3)
    driver.add("stops", prompt_of(5, 2), max_tokens=9, stop_token_ids=[EOS])
    driver.add("aborted", prompt_of(6, 3), max_tokens=50)
    for _ in range(12):
        driver.step()
    driver.abort("aborted")
    driver.run()
    stats = stats_of(driver)
    assert stats.num_generated_tokens == sum(map(len, driver.tokens.values()))
    computed = [len(row.token_ids) for step in driver.steps for row in step.rows]
    assert stats.num_step_tokens == sum(computed)
    assert sum(stats.steps_by_tokens) == sum(bool(step.rows) for step in driver.steps)
    assert len(stats.steps_by_tokens) == len(STEP_TOKEN_BOUNDS) + 1
    assert stats.steps_by_tokens[0] == sum(len(step.rows) == 1 == len(step.rows[0].token_ids) for step in driver.steps)
    assert 30 + 9 + 5 + 6 <= stats.num_prefill_tokens <= sum(computed)


@both_modes
def test_gauges_tell_the_moment_and_nothing_is_held_at_the_end(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling, num_kv_blocks=8, num_host_blocks=16, preemption_mode="swap", max_num_seqs=2)
    for name in ("old", "new", "waits"):
        driver.add(name, prompt_of(8, len(name)), max_tokens=16)
    seen = []
    while driver.scheduler.has_work:
        driver.step()
        seen.append(stats_of(driver))
    assert max(each.num_running for each in seen) == 2
    assert seen[0].num_waiting == 1
    assert any(each.num_swapped for each in seen)
    assert any(each.num_used_host_blocks for each in seen)
    assert max(each.num_used_blocks for each in seen) == 8
    assert all(each.num_used_blocks + each.num_cached_blocks <= each.num_blocks == 8 for each in seen)
    driver.run()
    last = stats_of(driver)
    held = last.num_running, last.num_waiting, last.num_swapped, last.num_used_blocks, last.num_used_host_blocks
    assert held == (0, 0, 0, 0, 0)
    assert last.num_cached_blocks > 0
    assert (last.incarnation, last.group, last.num_host_blocks) == (7, 1, 16)
    assert last.num_preemptions >= last.num_swaps > 0


def test_totals_go_on_where_the_schedulers_before_stopped() -> None:
    """Each one counts from 0, and a counter must not go back."""
    first = Stats(
        1, 3, num_running=2, num_query_tokens=10, num_step_tokens=7, steps_by_tokens=[2, 1], recovery_seconds=2.5,
        restarts={"died": 2, "start": 1}, num_frames_rejected=4,
    )  # fmt: skip
    heard_more = dataclasses.replace(first, num_query_tokens=12, restarts={"died": 3})
    past = PastTotals()
    for _ in range(2):  # front ends say so each time they greet
        past.hear(totals_of(first))
        past.hear(totals_of(heard_more))
        past.hear({})
    fresh = Stats(2, 1, steps_by_tokens=[0, 0])
    assert past.under(fresh) == dataclasses.replace(
        heard_more, incarnation=2, group=1, num_running=0, restarts={"died": 3, "start": 1}
    )
    later = Stats(2, 2, num_query_tokens=3, steps_by_tokens=[1, 1, 1], restarts={"silent": 1, "died": 1})
    told = past.under(later)
    assert (told.num_query_tokens, told.num_step_tokens, told.steps_by_tokens) == (15, 7, [3, 2, 1])
    assert told.restarts == {"silent": 1, "died": 4, "start": 1}
    assert {field.name for field in dataclasses.fields(Stats)} >= set(TOTALS) == totals_of(first).keys()


def test_prefix_hits_are_counted_in_tokens() -> None:
    driver = Driver()
    for name in ("first", "again"):
        driver.add(name, prompt_of(17), max_tokens=1)
        driver.run()
    stats = stats_of(driver)
    assert (stats.num_query_tokens, stats.num_hit_tokens, stats.num_host_hit_tokens) == (34, 16, 0)


def test_the_first_tokens_tell_how_long_the_request_waited() -> None:
    """A stop string ends a request in the front end, which then hears no last word of the scheduler."""
    driver = Driver(max_num_seqs=1)
    driver.add("a", prompt_of(4), max_tokens=4)
    driver.add("b", prompt_of(4, 1), max_tokens=4)
    driver.step_seconds = lambda step: 1.0
    while not driver.tokens["b"]:
        driver.step()
    metrics = driver.last["b"].metrics
    assert metrics is not None
    assert metrics["queue_seconds"] == 4.0
    driver.step()
    assert driver.last["b"].metrics is None, "once is enough"


def test_front_ends_are_told_now_and_then_and_once_at_the_end() -> None:
    times, told = ReportTimes(), []
    for tick in range(1000):
        now = tick / 100
        if times.is_due(now, has_work=100 <= tick < 450):
            told.append(now)
    # When it begins, each second, and when it is done.
    assert told == [1.0, 2.0, 3.0, 4.0, 4.5]
    assert not times.is_pending, "an idle scheduler need not wake up"
    times.touch()
    assert times.is_pending
    assert times.is_due(20.0, has_work=False)
    assert not times.is_due(30.0, has_work=False)


def test_bursts_do_not_flood_the_front_ends() -> None:
    times = ReportTimes()
    told = sum(times.is_due(tick / 1000, has_work=tick % 2 == 0) for tick in range(10_000))
    assert told <= 10 / SETTLE_SECONDS
    assert REPORT_SECONDS > SETTLE_SECONDS


def test_a_status_line_comes_for_each_ten_seconds_of_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = StatusLine(10.0)
    idle = Stats(1, 1, num_blocks=100, steps_by_tokens=[0])
    busy = dataclasses.replace(idle, num_running=3, num_waiting=2, num_used_blocks=25)
    totals = {"num_prefill_tokens": 50, "num_generated_tokens": 200, "num_query_tokens": 80, "num_hit_tokens": 20}
    line.update(idle, 0.0)
    line.update(busy, 100.0)
    for second in range(101, 106):
        line.update(busy, float(second))
    line.update(idle, 106.0)  # what follows is no work
    line.update(busy, 500.0)
    for second in range(501, 504):
        line.update(busy, float(second))
    assert not caplog.records
    line.update(dataclasses.replace(busy, **totals), 504.0)
    assert [record.getMessage() for record in caplog.records] == [
        "running: 3, waiting: 2, K/V cache: 25.0%, prefix hits: 25.0%, prompt: 5.0 tokens/s, generation: 20.0 tokens/s"
    ]
    for second in range(505, 600):
        line.update(dataclasses.replace(idle, **totals), float(second))
    assert len(caplog.records) == 1, "silent when idle"


def test_no_status_lines_where_none_are_wanted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = StatusLine(0.0)
    for second in range(100):
        line.update(Stats(1, 1, num_running=1), float(second))
    assert not caplog.records


def test_swapping_and_preemptions_stand_in_the_line_where_there_are_any(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line = StatusLine(1.0)
    line.update(Stats(1, 1, num_running=1, num_host_blocks=9), 0.0)
    line.update(Stats(1, 1, num_running=1, num_host_blocks=9, num_swapped=4, num_preemptions=5), 1.0)
    (record,) = caplog.records
    assert "swapped: 4" in record.getMessage()
    assert record.getMessage().endswith("preempted: 5")
