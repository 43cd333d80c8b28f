"""The clients when the scheduler is gone: requests go on with the next one, until that has become pointless."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import CapacityError, DeadlineError, EngineDeadError, RequestTimeoutError, to_wire
from nanoengine import LLM, AsyncLLM, SamplingParams
from nanoengine.engine_client import EngineClient
from nanoengine.engine_status import AttachedEngine, EngineCondition, SchedulerRestartStats
from nanoengine.messages import Abort, AbortNamed, AddRequest, Deltas, EngineFailure, Hello, TokenDelta
from nanoengine.outputs import RequestOutput
from nanoengine.prompt_log import PromptLogprobs
from tests.nanoengine.fake_engine import FakeEngineProcess, collect, expected
from tests.nanoengine.test_engine_client import Clock, add, ids_of, make_client, sent, tell
from tests.waiting import until, until_async

pytestmark = pytest.mark.usefixtures("fake_process")
LONG = SamplingParams(max_tokens=50)
made = FakeEngineProcess.made


def pause_at(position: int, process: FakeEngineProcess) -> None:
    """Let it answer up to this position of a request, and then wait for its death."""
    step = process._step

    def step_and_pause() -> list[TokenDelta]:
        deltas = step()
        if any(delta.start >= position for delta in deltas):
            process.hold.set()
        return deltas

    process._step = step_and_pause  # type: ignore[method-assign]


# -- an event loop ----------------------------------------------------------------------------------------------


async def test_streams_go_on_behind_their_last_token_through_several_deaths(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FakeEngineProcess.start

    def start(self: FakeEngineProcess) -> None:
        if self.incarnation < 4:
            pause_at(10 * self.incarnation, self)
        original(self)

    monkeypatch.setattr(FakeEngineProcess, "start", start)
    pause_at(10, made[0])
    assert llm._client is not None
    journals = llm._client._live
    streams = [asyncio.create_task(collect(llm, [number], LONG)) for number in range(8)]
    for number in (1, 2, 3):
        await until_async(lambda number=number: len(made) == number and made[-1].hold.is_set())  # type: ignore[misc]
        told = made[-1]._live
        await until_async(lambda told=told: all(journals[name].num_generated_tokens == told[name][1] for name in told))  # type: ignore[misc]
        made[-1].has_progressed = True
        made[-1].die()
    for number, stream in enumerate(streams):
        shown = [output.outputs[0].token_ids for output in await stream]
        assert shown[-1] == expected([number], 50)
        assert all(later[: len(earlier)] == earlier for earlier, later in itertools.pairwise(shown))
    assert [process.incarnation for process in made] == [1, 2, 3, 4]
    for process, so_far in zip(made[1:], (10, 20, 30), strict=True):
        assert max(len(request.journal[0]) for request in process.added) > so_far, "its journal comes along"
    assert all(process.stops for process in made[:3])
    stats = llm.restart_stats
    assert (stats.restarts, stats.requests_resumed) == (Counter(died=3), 24)
    assert stats.seconds >= stats.last_seconds > 0
    assert (llm.is_ready, llm.failure) == (True, None)


@pytest.fixture
def gate(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The next scheduler is not ready before it is set."""
    gate = threading.Event()
    monkeypatch.setattr(FakeEngineProcess, "start_gate", gate)
    return gate


async def test_meanwhile_the_engine_is_not_ready_and_new_requests_wait(llm: AsyncLLM, gate: threading.Event) -> None:
    made[0].hold.set()
    open_one = asyncio.create_task(collect(llm, [1], LONG))
    await until_async(lambda: made[0].added)
    made[0].die("killed by signal 9")
    await until_async(lambda: llm.recovering_from is not None)
    assert not llm.is_ready
    assert llm.failure is None
    assert "killed by signal 9" in str(llm.recovering_from)
    new = asyncio.create_task(collect(llm, [2], LONG))
    aborted = asyncio.create_task(collect(llm, [3], LONG, "mine"))
    await until_async(lambda: llm.num_unfinished == 3)
    await llm.abort("mine")
    assert (await aborted)[-1].outputs[0].finish_reason == "abort"
    gate.set()
    assert [(await task)[-1].outputs[0].token_ids for task in (open_one, new)] == [expected([n], 50) for n in (1, 2)]
    assert llm.is_ready
    assert [request.prompt_token_ids for request in made[1].added] == [[1], [2]], "each once, the oldest first"


async def test_deadlines_pass_while_there_is_no_scheduler(
    llm: AsyncLLM, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoengine.async_llm._WATCH_INTERVAL", 0.01)
    made[0].hold.set()
    late = asyncio.create_task(collect(llm, [1], LONG, timeout=0.3))
    patient = asyncio.create_task(collect(llm, [2], LONG, timeout=600))
    await until_async(lambda: len(made[0].added) == 2)
    made[0].die()
    with pytest.raises(RequestTimeoutError, match=r"within 0\.3 s"):
        await late
    gate.set()
    assert (await patient)[-1].outputs[0].token_ids == expected([2], 50)
    assert [request.timeout for request in made[1].added] == [600]


async def test_one_that_hangs_is_killed_and_replaced(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.async_llm._WATCH_INTERVAL", 0.01)
    assert llm._client is not None
    silence, replace = llm._client._silence, llm._engine.replace

    def replace_once(*args: Any) -> None:
        silence._limit = 60.0
        replace(*args)

    monkeypatch.setattr(llm._engine, "replace", replace_once)
    silence._limit = 0.1
    made[0].hold.set()
    made[0].is_mute = True
    stream = asyncio.create_task(collect(llm, [1], LONG))
    assert (await stream)[-1].outputs[0].token_ids == expected([1], 50)
    assert isinstance(made[0].failure(), DeadlineError)
    assert llm.restart_stats.restarts == Counter(silent=1)


@pytest.mark.parametrize("settings", [{"max_restarts": 3}])
async def test_restarts_that_bring_no_token_end_it(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FakeEngineProcess._take

    def take(self: FakeEngineProcess, message: Any, send: Callable[[Any], None]) -> None:
        original(self, message, send)
        if self.added:
            self.hold.set()
            self.die("exit code 1")

    monkeypatch.setattr(FakeEngineProcess, "_take", take)
    with pytest.raises(EngineDeadError, match=r"exit code 1; 3 schedulers in its place within 60 s brought no token"):
        await collect(llm, [1])
    assert [process.incarnation for process in made] == [1, 2, 3, 4]
    assert isinstance(llm.failure, EngineDeadError)
    assert llm.recovering_from is None
    with pytest.raises(EngineDeadError, match="brought no token"):
        await collect(llm, [1])


@pytest.mark.parametrize("settings", [{"max_restarts": 2}])
async def test_starts_that_fail_are_repeated_and_counted(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for reasons that would be final at the first start: memory of what was killed may come back late."""
    monkeypatch.setattr("nanoengine.scheduler_keeper.pause_before", lambda _: 0.0)
    monkeypatch.setattr(FakeEngineProcess, "start_error", CapacityError("more memory than there is"))
    made[0].hold.set()
    made[0].has_progressed = True
    stream = asyncio.create_task(collect(llm, [1]))
    await until_async(lambda: made[0].added)
    made[0].die()
    with pytest.raises(EngineDeadError, match="more memory than there is; 2 schedulers"):
        await stream
    assert len(made) == 4, "the first followed tokens and does not count"


async def test_what_a_scheduler_found_hopeless_is_not_tried_again(llm: AsyncLLM) -> None:
    made[0].hold.set()
    stream = asyncio.create_task(collect(llm, [1]))
    await until_async(lambda: made[0].added)
    made[0].is_hopeless = True
    made[0].die("5 groups of ranks brought no step")
    with pytest.raises(EngineDeadError, match="5 groups of ranks"):
        await stream
    assert len(made) == 1


async def test_its_last_words_say_so_too(llm: AsyncLLM) -> None:
    """They may arrive before its end is noticed."""
    made[0].hold.set()
    stream = asyncio.create_task(collect(llm, [1]))
    await until_async(lambda: made[0].added)
    made[0].inject(EngineFailure(1, to_wire(CapacityError("out of blocks"))))
    with pytest.raises(EngineDeadError, match="out of blocks"):
        await stream


async def test_closing_while_there_is_no_scheduler(llm: AsyncLLM, gate: threading.Event) -> None:
    made[0].hold.set()
    stream = asyncio.create_task(collect(llm, [1]))
    await until_async(lambda: made[0].added)
    made[0].die()
    await until_async(lambda: len(made) == 2)
    async with asyncio.timeout(5):
        await llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await stream
    until(lambda: made[1].stops > 0)
    assert len(made) == 2


async def test_an_idle_engine_has_another_scheduler_before_anybody_asks(
    llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoengine.async_llm._WATCH_INTERVAL", 0.01)
    made[0].die()
    await until_async(lambda: len(made) == 2 and llm.is_ready)
    assert (await collect(llm, [1]))[-1].outputs[0].token_ids == expected([1])
    await until_async(lambda: llm._watchdog is None)


# -- without one ------------------------------------------------------------------------------------------------


def test_the_blocking_client_goes_on_too(model: str) -> None:
    with LLM(model) as llm:
        pause_at(20, made[0])
        waiter = threading.Thread(target=lambda: (until(made[0].hold.is_set), made[0].die()))
        waiter.start()
        outputs = llm.generate([[1], [2]], LONG, use_tqdm=False)
        waiter.join()
        assert [output.outputs[0].token_ids for output in outputs] == [expected([n], 50) for n in (1, 2)]
        assert len(made) == 2
        made[1].die()
        until(lambda: len(made) == 3)
        [output] = llm.generate([[3]], LONG, use_tqdm=False)
        assert output.outputs[0].token_ids == expected([3], 50)
        assert made[2].added[-1].journal == [[]]


def test_the_blocking_client_keeps_its_time_limit_while_there_is_no_scheduler(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    with LLM(model) as llm:
        monkeypatch.setattr(FakeEngineProcess, "start_gate", gate)
        made[0].hold.set()
        llm.add_request([1], LONG)
        made[0].die()
        until(lambda: len(made) == 2)
        began = time.monotonic()
        assert llm.step(timeout=0.1) == []
        assert time.monotonic() - began < 5
        llm.add_request([2], LONG)
        gate.set()
        last: dict[int, RequestOutput] = {}
        while llm.has_unfinished_requests():
            last |= {output.prompt_token_ids[0]: output for output in llm.step(timeout=10)}
        assert [last[number].outputs[0].token_ids for number in (1, 2)] == [expected([n], 50) for n in (1, 2)]


# -- what the next scheduler is handed --------------------------------------------------------------------------


@pytest.fixture
def client(model: str) -> EngineClient:
    return make_client(EngineConfig.create(model=model).resolve(), None, Clock())


GONE = EngineCondition(1, "", EngineDeadError("killed by signal 9"))
NEXT = EngineCondition(2, "ipc://nowhere")


def test_the_next_scheduler_gets_what_is_open_once_and_the_rest_is_forgotten(client: EngineClient) -> None:
    begun, done = add(client, n=2), add(client)
    tell(client, begun, 0, [10, 11])
    tell(client, done, 0, [1], "length")
    client.handle(Deltas(1, [TokenDelta(begun.wire_id, 1, 0, [20], "stop")]))
    sent(client)
    client.detach(GONE)
    client.abort(add(client).request_id)
    client.abort_named(AbortNamed(["nobody"]))
    client.outbox.append(AbortNamed(["of another front end"]))
    new = add(client)
    client.attach(NEXT)
    hello, first, ended, second, named = sent(client)
    assert isinstance(hello, Hello)
    assert isinstance(first, AddRequest)
    assert (first.request_id, first.journal) == (begun.wire_id, [[10, 11], [20]])
    assert first.arrival_time == begun.metrics.arrival_time, "its time goes on"
    assert ended == Abort(begun.wire_id, 1, "stop")
    assert isinstance(second, AddRequest)
    assert second.request_id == new.wire_id
    assert named == AbortNamed(["of another front end"])
    client.handle(Deltas(1, [TokenDelta(begun.wire_id, 0, 2, [99])]))
    assert ids_of(begun) == [10, 11], "the last words of the old one came late"
    client.handle(Deltas(2, [TokenDelta(begun.wire_id, 0, 2, [12], "length")]))
    assert ids_of(begun) == [10, 11, 12]
    assert client.restart_stats.requests_resumed == 2


def test_log_probabilities_of_a_prompt_are_not_asked_for_twice(client: EngineClient) -> None:
    journal = add(client, prompt_logprobs=0)
    told = PromptLogprobs(0, 1, b"\x02\x00\x00\x00", bytes(4), b"\x01\x00\x00\x00")
    client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, 0, [], prompt_logprobs=told)]))
    client.detach(GONE)
    client.attach(NEXT)
    [message] = [each for each in sent(client) if isinstance(each, AddRequest)]
    assert message.num_prompt_logprobs == 1


def test_counts_are_the_engines_but_for_the_requests_which_are_ones_own(client: EngineClient) -> None:
    add(client)
    client.detach(GONE)
    told = SchedulerRestartStats(Counter(died=4), 8.0, 2.0, 77)
    client.attach(EngineCondition(2, "ipc://nowhere", restarts=told))
    assert client.restart_stats == SchedulerRestartStats(Counter(died=4), 8.0, 2.0, 1)
    assert told.requests_resumed == 77


def test_a_condition_travels_whole() -> None:
    told = SchedulerRestartStats(Counter(died=1, start=2), 3.5, 1.5)
    for condition in (EngineCondition(), EngineCondition(3, "ipc://x", restarts=told)):
        assert EngineCondition.from_dict(condition.to_dict()) == condition
    lost = EngineCondition(3, "", DeadlineError("silent"), True, told)
    again = EngineCondition.from_dict(lost.to_dict())
    assert (type(again.cause), str(again.cause), again.is_final, again.restarts) == (
        DeadlineError,
        "silent",
        True,
        told,
    )
    assert not again.serves


@pytest.fixture
def attached() -> Iterator[tuple[AttachedEngine, Callable[[EngineCondition], None], list[dict[str, Any]], int]]:
    """One of several front ends: what it sees of the engine, how its owner tells it, and what it asks of its owner."""
    read_fd, write_fd = os.pipe()
    asked: list[dict[str, Any]] = []
    engine = AttachedEngine(Path("/nowhere"), read_fd, asked.append)

    def tell(condition: EngineCondition) -> None:
        os.write(write_fd, json.dumps(condition.to_dict()).encode() + b"\n")

    yield engine, tell, asked, write_fd
    engine.stop()
    with contextlib.suppress(OSError):
        os.close(write_fd)


def test_a_front_end_that_starts_while_the_engine_recovers_waits_for_the_next_scheduler(attached: Any) -> None:
    engine, tell, asked, write_fd = attached
    assert engine.look() == EngineCondition()
    tell(EngineCondition(1, "", EngineDeadError("killed by signal 9")))
    with pytest.raises(DeadlineError, match="not ready"):
        engine.wait_ready(0.05)
    assert "killed" in str(engine.look().cause)
    tell(NEXT)
    engine.wait_ready(5)
    assert engine.look() == NEXT
    engine.replace(2, DeadlineError("silent for 30 s"))
    assert asked == [{"replace": 2, "error": to_wire(DeadlineError("silent for 30 s"))}]
    assert engine.look().serves, "the owner decides"
    os.close(write_fd)
    last = engine.look()
    assert (last.is_final, last.serves) == (True, False)
    assert "the process that owns the engine is gone" in str(last.cause)


def test_the_owners_last_word_is_final(attached: Any) -> None:
    engine, tell, _, _ = attached
    tell(NEXT)
    tell(EngineCondition(2, "", CapacityError("out of blocks"), is_final=True))
    assert isinstance(engine.look().cause, CapacityError)
    with pytest.raises(CapacityError):
        AttachedEngine.wait_ready(engine, 0.05)
