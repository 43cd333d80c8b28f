"""The scheduler's loop when ranks fail: streams go on, culprits are found, hopeless cases end. Without a process."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import CapacityError, WorkerError
from nanoengine.circuit_breaker import CircuitBreaker
from nanoengine.engine import EngineCore
from nanoengine.executor import MultiprocessExecutor
from nanoengine.front_socket import FrontSocket
from nanoengine.messages import (
    Abort,
    AddRequest,
    EngineFailure,
    Hello,
    Message,
    Ready,
    Recovering,
    Stats,
    decode,
    spelt_out,
)
from nanoengine.recovery import INNOCENT_TOKENS, Recovery
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import Epoch
from tests.nanoengine.fake_worker import POISON
from tests.nanoengine.process_tools import short_directory
from tests.nanoengine.scheduler_driver import Driver, expected_output
from tests.nanoengine.test_engine_core import EPOCH, FrontEnd, Served, served, settings
from tests.waiting import PATIENCE, until

__all__ = ["served", "settings"]  # fixtures


def fail(served: Served, message: str = "rank 1 died") -> None:
    served.executor.failure = WorkerError(message, 1, "died")


def until_told(front: FrontEnd, kind: type[Any]) -> tuple[Any, list[Message]]:
    """The next message of that kind, and what came before it."""
    before: list[Message] = []
    while True:
        message = front.receive()
        if isinstance(message, kind):
            return message, before
        before.append(message)


def greet(front: FrontEnd) -> None:
    front.send(Hello(front.client_id))
    assert isinstance(front.receive(), Ready)


def test_streams_go_on_without_a_lost_or_repeated_token_and_the_front_end_is_told(served: Served) -> None:
    front = served.front_end()
    greet(front)
    served.executor.failing_steps = {100, 101, 400}
    front.add("long", [5, 6], max_tokens=600, ignore_eos=True)
    tokens: list[int] = []
    for group in (2, 3, 4):
        ready, before = until_told(front, Ready)
        assert ready.group == group
        assert sum(isinstance(each, Recovering) for each in before) == 1
        tokens += [
            token for each in before for delta in spelt_out(getattr(each, "deltas", [])) for token in delta.token_ids
        ]
    rest, last = front.tokens_until_end("long")
    assert tokens + rest == expected_output([5, 6], 600)
    assert last.finish_reason == "length"
    assert served.executor.epochs == [Epoch(EPOCH.incarnation, group) for group in (2, 3, 4)]
    stats = served.core.recovery.stats
    assert stats.restarts == Counter(died=3)
    assert stats.requests_resumed == 3
    assert stats.tokens_recomputed > 0


def test_front_ends_hear_of_recoveries_and_refused_frames_while_nothing_is_asked(served: Served) -> None:
    """An idle engine tells nothing of itself otherwise."""
    front = served.front_end()
    greet(front)
    fail(served)
    until_told(front, Ready)
    front.socket.send(b"no message")
    stats = last_stats(front, lambda stats: stats.num_frames_rejected == 1 and bool(stats.restarts))
    assert stats.restarts == {"died": 1}
    assert stats.recovery_seconds == served.core.recovery.stats.seconds > 0
    assert stats.num_running == 0


def test_who_greets_is_told_the_totals_at_once_on_top_of_what_it_says_of_earlier_schedulers(served: Served) -> None:
    """A front end that showed smaller ones for a moment would take a counter back."""
    first, second = served.front_end("first"), served.front_end("second")
    first.send(Hello("first", {"num_step_tokens": 100, "restarts": {"died": 2}}))
    assert last_stats(first, lambda _: True).restarts == {"died": 2}
    greet(second)
    assert last_stats(second, lambda _: True).num_step_tokens == 100
    fail(served)
    assert last_stats(second, lambda stats: stats.recovery_seconds > 0).restarts == {"died": 3}


def last_stats(front: FrontEnd, condition: Callable[[Stats], bool]) -> Stats:
    """The statistics that fulfil the condition, as soon as they come."""
    deadline = time.monotonic() + 10
    while not front.stats or not condition(front.stats[-1]):
        assert time.monotonic() < deadline, front.stats
        if front.socket.poll(100):
            message = decode(front.socket.recv())
            front.stats += [message] if isinstance(message, Stats) else []
    return front.stats[-1]


def test_while_it_recovers_greetings_aborts_and_deadlines_are_served_and_requests_wait(served: Served) -> None:
    front = served.front_end()
    greet(front)
    served.executor.failing_steps, served.executor.hold_start = {2}, True
    front.add("aborted", [5], max_tokens=None, ignore_eos=True)
    sampling = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True).to_dict()
    front.send(AddRequest("c", "late", [6], sampling, 0, time.time(), 0, [[]], timeout=0.4))
    recovering, _ = until_told(front, Recovering)
    assert recovering.error["message"] == "rank 1 died"
    front.send(Hello("c"))
    _, before = until_told(front, Recovering)
    front.send(Abort("aborted", None, "test"))
    front.add("new", [7], max_tokens=5)
    error = until_end(front, "late", before)[1].error
    assert error is not None
    assert error["kind"] == "RequestTimeoutError"
    until(lambda: list(served.core.scheduler.requests) == [("c", "new")])
    served.executor.hold_start = False
    until_told(front, Ready)
    assert front.tokens_until_end("new")[0] == expected_output([7], 5)


def test_starts_that_fail_are_repeated(served: Served) -> None:
    """Memory of killed ranks may come back late."""
    front = served.front_end()
    greet(front)
    served.executor.failing_starts = 2
    fail(served)
    until_told(front, Ready)
    front.add("next", [7], max_tokens=5)
    assert front.tokens_until_end("next")[0] == expected_output([7], 5)
    assert served.core.recovery.stats.restarts == Counter(died=1, start=2)


@pytest.mark.parametrize("settings", [{"max_restarts": 2}])
def test_the_breaker_opens_when_no_start_brings_a_step(served: Served) -> None:
    front = served.front_end()
    greet(front)
    served.executor.failing_starts, served.executor.failing_steps = 100, {3}
    front.add("open", [5], max_tokens=None, ignore_eos=True)
    _, delta = until_end(front, "open")
    assert delta.finish_reason == "error"
    assert until_told(front, EngineFailure)[0].error["kind"] == "CapacityError"
    served.thread.join(PATIENCE)
    assert isinstance(served.error, CapacityError)
    assert len(served.executor.epochs) == 3, "the first restart followed steps and does not count"


def until_end(front: FrontEnd, request_id: str, before: Sequence[Message] = ()) -> tuple[list[int], Any]:
    """As `tokens_until_end`, with other messages in between, and `before` what comes now."""
    tokens: list[int] = []
    came = [*before]
    while True:
        for delta in spelt_out(getattr(came.pop(0) if came else front.receive(), "deltas", [])):
            if delta.request_id == request_id:
                tokens += delta.token_ids
                if delta.finish_reason:
                    return tokens, delta


@pytest.mark.parametrize("num_neighbours", [0, 1, 20])
def test_poison_is_found_and_its_neighbours_finish_as_if_it_had_not_been_there(
    served: Served, num_neighbours: int
) -> None:
    served.executor.poison = POISON
    front = served.front_end()
    for number in range(num_neighbours):
        front.add(str(number), [number + 1, 8], max_tokens=40)
    front.add("poison", [3, POISON], max_tokens=40)
    ends: dict[str, Any] = {}
    tokens: dict[str, list[int]] = {}
    while len(ends) <= num_neighbours:
        for delta in spelt_out(getattr(front.receive(), "deltas", [])):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                ends[delta.request_id] = delta
    assert ends["poison"].error["kind"] == "EngineError"
    assert "given up: the ranks failed 4 times" in ends["poison"].error["message"]
    for number in range(num_neighbours):
        assert tokens[str(number)] == expected_output([number + 1, 8], 40)
    assert served.executor.rows_at_failure[-1] == 1, "the last attempt is made alone"
    assert len(served.executor.rows_at_failure) == 4
    assert served.core.recovery.stats.requests_condemned == 1


def serve_poison(trial: int) -> None:
    """One trial with real ranks, which die of the poison: it fails, and 12 neighbours finish as if undisturbed."""
    config = EngineConfig.create(model="demo", tensor_parallel_size=1 + trial % 2).resolve()
    with short_directory() as directory:
        executor = MultiprocessExecutor(config, directory, entry="tests.nanoengine.fake_worker:run_inventing")
        front = FrontSocket(f"ipc://{directory}/front", 1)
        core = EngineCore(config, executor, front, executor.start(Epoch(1, 1)), Epoch(1, 1))
        thread = threading.Thread(target=core.serve)
        thread.start()
        client = FrontEnd(f"ipc://{directory}/front", "c")
        try:
            for number in range(12):
                if number == trial % 12:
                    client.add("poison", [3, POISON, 4], max_tokens=40)
                client.add(str(number), [number + 1, 8], max_tokens=60)
            ends: dict[str, Any] = {}
            tokens: dict[str, list[int]] = {}
            while len(ends) < 13:
                for delta in spelt_out(getattr(client.receive(), "deltas", [])):
                    tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
                    if delta.finish_reason:
                        ends[delta.request_id] = delta
            assert "given up: the ranks failed 4 times" in ends["poison"].error["message"]
            for number in range(12):
                assert tokens[str(number)] == expected_output([number + 1, 8], 60)
        finally:
            core.stop()
            thread.join(PATIENCE)
            executor.stop()
            client.socket.close(0)
            front.close()


def test_poison_that_kills_real_ranks_is_found() -> None:
    serve_poison(1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_poison_that_kills_real_ranks_is_found_20_times() -> None:
    for trial in range(20):
        serve_poison(trial)


# -- the parts alone --------------------------------------------------------------------------------------------


def test_the_breaker_counts_only_what_is_futile_and_recent() -> None:
    now = 0.0
    breaker = CircuitBreaker(2, 10, lambda: now)
    assert all(breaker.allows(futile=False) for _ in range(9))
    assert breaker.allows(futile=True)
    now = 9.0
    assert breaker.allows(futile=True)
    assert not breaker.allows(futile=True)
    now = 10.5
    assert breaker.allows(futile=True), "the first one is a while ago"
    breaker.reset()
    assert breaker.allows(futile=True)
    assert not CircuitBreaker(0, 10, lambda: now).allows(futile=False)


def crash(driver: Driver, recovery: Recovery) -> None:
    """The ranks die in a step, and a new group starts."""
    step = driver.scheduler.schedule()
    assert step is not None
    assert recovery.failed(WorkerError("died", 0), num_steps=1)
    epoch = driver.scheduler.epoch
    driver.new_epoch(Epoch(epoch.incarnation, epoch.group + 1))
    recovery.resumed()


def test_whose_decodes_crash_is_found_although_its_prefills_bring_tokens() -> None:
    driver = Driver()
    recovery = Recovery(driver.scheduler, 5, 60)
    driver.add("poison", [1, 2, 3], max_tokens=50)
    driver.add("neighbour", [4, 5], max_tokens=50)
    for _ in range(20):
        if "poison" in driver.finished:
            break
        driver.step()
        recovery.review()
        poison = driver.scheduler.requests.get(("c", "poison"))
        if poison is not None and poison.seqs[0].num_computed_tokens > poison.seqs[0].num_prompt_tokens - 1:
            crash(driver, recovery)
        driver.receive()
    assert driver.finished == {"poison": "error"}
    while driver.scheduler.has_work:
        driver.step()
        recovery.review()
    assert driver.tokens["neighbour"] == expected_output([4, 5], 50)


def test_who_comes_on_between_failures_is_never_suspected() -> None:
    driver = Driver()
    recovery = Recovery(driver.scheduler, 5, 60)
    driver.add("long", [1, 2, 3], max_tokens=100)
    for _ in range(12):
        for _ in range(INNOCENT_TOKENS + 1):
            driver.step()
            recovery.review()
        crash(driver, recovery)
        assert driver.scheduler.trial is None
    driver.run()
    assert driver.tokens["long"] == expected_output([1, 2, 3], 100)
