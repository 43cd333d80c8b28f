"""Statistics of the engine: totals of the scheduler, when front ends are told of them, and the status line.

A step costs two additions and a look into a table of bounds; the rest is done about once a second. It reads the
scheduler and changes nothing in it, and knows no socket.
"""

from __future__ import annotations

import dataclasses
import logging
import operator
from bisect import bisect_left
from collections.abc import Callable
from itertools import starmap, zip_longest
from typing import TYPE_CHECKING, Any

from nanoengine.messages import TOTALS, Stats
from nanoengine.sequence import SequenceStatus

if TYPE_CHECKING:
    from nanoengine.decode_set import StepInFlight
    from nanoengine.recovery import RecoveryStats
    from nanoengine.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Steps are counted by the number of tokens they compute, up to each bound; vLLM's buckets.
STEP_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Front ends are told so often while there is work, and soon when it begins and when it is done.
REPORT_SECONDS = 1.0
SETTLE_SECONDS = 0.25
# Why ranks are started again: `WorkerError.reason`, or "start" for ranks that failed while they started.
RESTART_REASONS = ("died", "raised", "silent", "overdue", "broken", "failed", "start")
# The same of the scheduler; see `engine_status.SchedulerRestartStats`.
SCHEDULER_RESTART_REASONS = ("died", "raised", "silent", "stopped", "start")


class StepTotals:
    """What was computed in the scheduler's life.

    Attributes:
        num_prefill_tokens: tokens of prompts, and of outputs that were computed again.
        num_generated_tokens: tokens that were sampled and belong to an output, or to a beam.
        num_step_tokens: all rows' tokens.
        steps_by_tokens: steps by their number of tokens: up to each of `STEP_TOKEN_BOUNDS`, and more.
    """

    def __init__(self) -> None:
        self.num_prefill_tokens = self.num_generated_tokens = self.num_step_tokens = 0
        self.steps_by_tokens = [0] * (len(STEP_TOKEN_BOUNDS) + 1)

    def count_step(self, flight: StepInFlight) -> tuple[int, int]:
        """A step returned; returns how many generated tokens it computed, and how many others."""
        num_decodes, num_prefill_tokens = flight.num_decodes, flight.num_prefill_tokens
        num_tokens = num_decodes + num_prefill_tokens
        if num_tokens:  # a step may only name who is dropped
            self.num_prefill_tokens += num_prefill_tokens
            self.num_step_tokens += num_tokens
            self.steps_by_tokens[bisect_left(STEP_TOKEN_BOUNDS, num_tokens)] += 1
        return num_decodes, num_prefill_tokens


def engine_stats(scheduler: Scheduler, incarnation: int, recovery: RecoveryStats, num_frames_rejected: int) -> Stats:
    """The state between two steps, and the totals so far."""
    blocks, host, totals = scheduler.blocks, scheduler.blocks.host, scheduler.totals
    num_swapped = sum(seq.status is SequenceStatus.SWAPPED for seq in scheduler.waiting)
    return Stats(
        incarnation=incarnation,
        group=scheduler.epoch.group,
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting) - num_swapped,
        num_swapped=num_swapped,
        num_blocks=blocks.num_blocks,
        num_used_blocks=blocks.num_blocks - blocks.num_free_blocks,
        num_cached_blocks=blocks.num_cached_blocks,
        num_host_blocks=host.num_blocks,
        num_used_host_blocks=host.num_blocks - host.num_free_blocks,
        num_cached_host_blocks=host.num_cached_blocks,
        num_query_tokens=blocks.num_query_tokens,
        num_hit_tokens=blocks.num_hit_tokens,
        num_host_hit_tokens=blocks.num_host_hit_tokens,
        num_preemptions=scheduler.num_preemptions,
        num_swaps=scheduler.num_swaps,
        num_prefill_tokens=totals.num_prefill_tokens,
        num_generated_tokens=totals.num_generated_tokens,
        num_step_tokens=totals.num_step_tokens,
        steps_by_tokens=totals.steps_by_tokens[:],
        restarts=dict(recovery.restarts),
        recovery_seconds=recovery.seconds,
        num_requests_resumed=recovery.requests_resumed,
        num_tokens_recomputed=recovery.tokens_recomputed,
        num_requests_condemned=recovery.requests_condemned,
        num_steps_given_up=recovery.steps_given_up,
        num_scheduler_faults=recovery.scheduler_faults,
        num_frames_rejected=num_frames_rejected,
    )


def totals_of(stats: Stats) -> dict[str, Any]:
    """What the next scheduler is told, should this one end: it counts from 0, and its totals must not go back.

    What was counted behind these statistics, at most a second's work, is lost.
    """
    return {name: getattr(stats, name) for name in TOTALS}


class PastTotals:
    """What the schedulers before this one have counted, as the front ends tell it that heard of them."""

    def __init__(self) -> None:
        self._totals: dict[str, Any] = {}

    def hear(self, totals: dict[str, Any]) -> None:
        """A front end tells; it may have heard less than others, and tells the same again."""
        self._totals |= {name: _merged(max, total, self._totals.get(name)) for name, total in totals.items()}

    def under(self, stats: Stats) -> Stats:
        """The statistics with these totals added."""
        added = {name: _merged(operator.add, getattr(stats, name), past) for name, past in self._totals.items()}
        return dataclasses.replace(stats, **added)


def _merged(operation: Callable[[Any, Any], Any], total: Any, other: Any) -> Any:
    """Two totals as one: of numbers, of lists place by place, of dictionaries key by key."""
    if other is None:
        return total
    if isinstance(total, list):
        return list(starmap(operation, zip_longest(total, other, fillvalue=0)))
    if isinstance(total, dict):
        keys = [*total, *(key for key in other if key not in total)]
        return {key: operation(total.get(key, 0), other.get(key, 0)) for key in keys}
    return operation(total, other)


class ReportTimes:
    """Decides when front ends are told: now and then while there is work, and once when it is done."""

    def __init__(self) -> None:
        self._last = float("-inf")
        self._had_work = False  # then
        self.is_pending = False  # something happened since they were told

    def touch(self) -> None:
        """Something happened that may have changed what they know."""
        self.is_pending = True

    def is_due(self, now: float, has_work: bool) -> bool:
        """Whether to tell them at `now`, in seconds that only grow; says so once."""
        self.is_pending = self.is_pending or has_work
        patience = REPORT_SECONDS if has_work and self._had_work else SETTLE_SECONDS
        if not self.is_pending or now < self._last + patience:
            return False
        self._last, self._had_work, self.is_pending = now, has_work, has_work
        return True


class StatusLine:
    """Logs one line for each `interval` seconds of work; time without work counts for nothing.

    Args:
        interval: 0 for no lines.
    """

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._last: tuple[float, Stats] | None = None
        self._first: Stats | None = None  # of what the next line covers
        self._worked = 0.0

    def update(self, stats: Stats, now: float) -> None:
        """Take in the statistics at `now`, and log a line if it is time."""
        if not self._interval:
            return
        if self._last is not None and has_work(self._last[1]):
            self._worked += now - self._last[0]
        self._last = now, stats
        if self._first is None:
            self._first = stats
        if self._worked >= self._interval:
            logger.info("%s", describe(self._first, stats, self._worked))
            self._first, self._worked = stats, 0.0


def has_work(stats: Stats) -> bool:
    """Whether anything ran or waited then."""
    return stats.num_running + stats.num_waiting + stats.num_swapped > 0


def describe(before: Stats, after: Stats, seconds: float) -> str:
    """The status line of `seconds` of work between two times."""
    prefill = (after.num_prefill_tokens - before.num_prefill_tokens) / seconds
    generated = (after.num_generated_tokens - before.num_generated_tokens) / seconds
    swapped = f", swapped: {after.num_swapped}" if after.num_host_blocks else ""
    preempted = after.num_preemptions - before.num_preemptions
    return (
        f"running: {after.num_running}, waiting: {after.num_waiting}{swapped}, "
        f"K/V cache: {_percent(after.num_used_blocks, after.num_blocks)}, "
        f"prefix hits: {_percent(after.num_hit_tokens, after.num_query_tokens)}, "
        f"prompt: {prefill:.1f} tokens/s, generation: {generated:.1f} tokens/s"
        + (f", preempted: {preempted}" if preempted else "")
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}%" if whole else "0.0%"
