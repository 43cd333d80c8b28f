"""The client for an event loop: streams, slow readers, leaving early, thousands at once, start and end."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import (
    CapacityError,
    ConfigError,
    DeadlineError,
    EngineDeadError,
    EngineError,
    RequestError,
    to_wire,
)
from nanoengine import AsyncLLM
from nanoengine.async_llm import STATE_INTERVAL
from nanoengine.detokenizer import IncrementalDetokenizer
from nanoengine.journal import RequestJournal
from nanoengine.messages import AddRequest, Deltas, Message, StateRequest, TokenDelta
from nanoengine.outputs import RequestOutput
from nanoengine.sampling_params import SamplingParams
from tests.nanoengine.fake_engine import ENDLESS, VOCAB_SIZE, FakeEngineProcess, collect, expected
from tests.waiting import PATIENCE, until_async

pytestmark = pytest.mark.usefixtures("fake_process")
LONG = SamplingParams(max_tokens=50)


# -- streams ---------------------------------------------------------------------------------------------------


async def test_each_output_holds_everything_so_far(llm: AsyncLLM) -> None:
    outputs = await collect(llm, [1, 2, 3])
    ids = [output.outputs[0].token_ids for output in outputs]
    assert ids[-1] == expected([1, 2, 3])
    for earlier, later in itertools.pairwise(ids):
        assert later[: len(earlier)] == earlier
        assert len(later) > len(earlier)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert llm.num_unfinished == 0


async def test_text_goes_in_and_out(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("北京。")
    process.tokens_of = lambda request: ids
    outputs = await collect(llm, "中国的首都是", request_id="mine")
    assert outputs[-1].request_id == "mine"
    assert outputs[-1].prompt == "中国的首都是"
    assert outputs[-1].outputs[0].text == "北京。"


async def test_a_slow_reader_sees_many_tokens_at_once_and_costs_no_memory(
    llm: AsyncLLM, process: FakeEngineProcess
) -> None:
    gate = asyncio.Event()

    async def slow() -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate([1], LONG):
            outputs.append(output)
            await gate.wait()
        return outputs

    reader = asyncio.create_task(slow())
    fast = await collect(llm, [2], LONG)
    await until_async(lambda: llm.num_unfinished == 0)
    gate.set()
    outputs = await reader
    assert len(fast) > 0
    assert len(outputs) <= 3, "outputs queued up for a reader that did not read"
    assert outputs[-1].outputs[0].token_ids == expected([1], 50)


async def test_thousands_of_streams_at_once(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    process.tokens_per_step = 4
    results = await asyncio.gather(*(collect(llm, [n % 50], SamplingParams(max_tokens=8)) for n in range(2000)))
    assert all(outputs[-1].outputs[0].token_ids == expected([n % 50], 8) for n, outputs in enumerate(results))
    assert not llm._news


async def test_a_long_text_is_encoded_off_the_event_loop(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert llm.tokenizer is not None
    threads = []

    def encode(text: str) -> list[int]:
        threads.append(threading.current_thread())
        return [1]

    monkeypatch.setattr(llm.tokenizer, "encode", encode)
    await collect(llm, "short")
    await collect(llm, "long" * 10_000)
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()


# -- leaving ---------------------------------------------------------------------------------------------------


async def test_leaving_the_iteration_aborts_the_request(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    process.tokens_of = lambda request: ENDLESS
    async for _ in llm.generate([1], LONG):
        break
    await until_async(lambda: len(process.aborted) == 1)
    assert llm.num_unfinished == 0
    assert not llm._news


@pytest.mark.parametrize("hold", [True, False])
async def test_cancelling_the_reader_aborts_the_request(llm: AsyncLLM, process: FakeEngineProcess, hold: bool) -> None:
    process.tokens_of = lambda request: ENDLESS
    if hold:
        process.hold.set()
    reader = asyncio.create_task(collect(llm, [1], LONG))
    await until_async(lambda: process.added)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until_async(lambda: len(process.aborted) == 1)
    assert llm.num_unfinished == 0


@pytest.mark.parametrize("hold", [True, False])
async def test_an_abort_by_id_ends_the_stream_as_such(llm: AsyncLLM, process: FakeEngineProcess, hold: bool) -> None:
    process.tokens_of = lambda request: ENDLESS
    if hold:
        process.hold.set()
    reader = asyncio.create_task(collect(llm, [1], LONG, request_id="a"))
    await until_async(lambda: process.added)
    await llm.abort("a")
    await llm.abort("a")
    await llm.abort("unknown")
    outputs = await reader
    assert outputs[-1].outputs[0].finish_reason == "abort"
    await until_async(lambda: len(process.aborted) == 1)


# -- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", [], [VOCAB_SIZE], [1] * 1000, None, [1.5], {"text": "x"}])
async def test_a_request_that_cannot_be_served_raises_before_the_first_output(llm: AsyncLLM, prompt: Any) -> None:
    with pytest.raises(RequestError):
        await collect(llm, prompt)
    assert llm.num_unfinished == 0


async def test_a_live_request_id_is_refused(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    process.hold.set()
    reader = asyncio.create_task(collect(llm, [1], request_id="a"))
    await until_async(lambda: process.added)
    with pytest.raises(RequestError, match="still runs"):
        await collect(llm, [1], request_id="a")
    process.hold.clear()
    assert (await reader)[-1].finished


async def test_a_refusal_of_the_scheduler_is_raised_with_its_type(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    def script(request: AddRequest) -> list[Message]:
        error = to_wire(RequestError("can never fit", "prompt", "context_length_exceeded"))
        return [Deltas(1, [TokenDelta(request.request_id, 0, 0, [], "error", error=error)])]

    process.script = script
    with pytest.raises(RequestError, match="can never fit") as refused:
        await collect(llm, [1])
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
async def test_when_the_engine_dies_each_stream_ends_and_the_next_call_says_why(
    llm: AsyncLLM, process: FakeEngineProcess
) -> None:
    process.tokens_of = lambda request: ENDLESS if request.prompt_token_ids == [1] else []
    first = asyncio.Event()

    async def read() -> list[RequestOutput]:
        outputs = []
        async for output in llm.generate([1], LONG):
            outputs.append(output)
            first.set()
        return outputs

    begun = asyncio.create_task(read())
    await first.wait()
    process.hold.set()
    waiting = asyncio.create_task(collect(llm, [2], LONG))
    await until_async(lambda: len(process.added) == 2)
    assert llm.is_ready
    process.die("killed by signal 9")
    outputs = await begun
    assert outputs[-1].outputs[0].finish_reason == "error"
    assert "signal 9" in str(outputs[-1].outputs[0].error)
    with pytest.raises(EngineDeadError, match="signal 9"):
        await waiting
    assert not llm.is_ready
    assert isinstance(llm.failure, EngineDeadError)
    with pytest.raises(EngineDeadError, match="signal 9"):
        await collect(llm, [1])


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
async def test_a_scheduler_that_hangs_ends_the_streams(
    llm: AsyncLLM, process: FakeEngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoengine.async_llm._WATCH_INTERVAL", 0.01)
    assert llm._client is not None
    monkeypatch.setattr(llm._client._silence, "_limit", 0.1)
    process.hold.set()
    process.is_mute = True
    with pytest.raises(EngineDeadError, match="has not said anything"):
        await collect(llm, [1])


# -- start and end ---------------------------------------------------------------------------------------------


async def test_the_event_loop_goes_on_while_the_engine_starts(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(FakeEngineProcess, "start_gate", gate)
    llm = AsyncLLM(model)
    assert (llm.is_ready, llm.tokenizer, llm.failure) == (False, None, None)
    starting = [asyncio.create_task(llm.start()) for _ in range(3)]
    stream = asyncio.create_task(collect(llm, [1]))
    starting[0].cancel()
    await until_async(lambda: FakeEngineProcess.made)  # the loop goes on
    await asyncio.sleep(0.05)
    assert not llm.is_ready
    gate.set()
    assert (await stream)[-1].finished, "cancelling one caller of start stopped it for all"
    assert llm.is_ready
    assert llm.facts is not None
    assert llm.facts.num_kv_blocks == 8
    await llm.close()


async def test_a_start_that_fails_is_raised_to_each_caller_and_kept(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeEngineProcess, "start_error", CapacityError("more memory than there is"))
    llm = AsyncLLM(model)
    for _ in range(2):
        with pytest.raises(CapacityError, match="more memory"):
            await llm.start()
    assert isinstance(llm.failure, CapacityError)
    assert FakeEngineProcess.made[-1].stops >= 1
    await llm.close()


async def test_close_ends_open_streams_and_is_harmless_twice(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    process.hold.set()
    reader = asyncio.create_task(collect(llm, [1]))
    await until_async(lambda: process.added)
    await asyncio.gather(llm.close(), llm.close())
    await llm.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await reader
    with pytest.raises(EngineDeadError, match="closed"):
        await collect(llm, [1])
    assert not llm.is_ready


async def test_close_while_starting_and_before_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngineProcess, "start_gate", threading.Event())
    llm = AsyncLLM(model)
    starting = asyncio.create_task(llm.start())
    await asyncio.sleep(0.02)
    async with asyncio.timeout(PATIENCE):
        await llm.close()
    with pytest.raises((EngineDeadError, asyncio.CancelledError)):
        await starting
    never_started = AsyncLLM(model)
    await never_started.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await never_started.start()


async def test_two_engines_on_one_loop_do_not_meet(model: str) -> None:
    async with AsyncLLM(model) as first, AsyncLLM(model) as second:
        results = await asyncio.gather(collect(first, [1]), collect(second, [2]))
    assert [outputs[-1].outputs[0].token_ids for outputs in results] == [expected([1]), expected([2])]
    assert [len(process.added) for process in FakeEngineProcess.made] == [1, 1]


def test_another_event_loop_is_refused_instead_of_hanging(model: str) -> None:
    llm = AsyncLLM(model)
    asyncio.run(llm.start())
    with pytest.raises(EngineError, match="event loop"):
        asyncio.run(collect(llm, [1]))
    asyncio.run(llm.close())
    assert FakeEngineProcess.made[-1].stops >= 1


async def test_the_settings_may_be_given_as_a_config(model: str) -> None:
    config = EngineConfig.create(model=model, max_model_len=32)
    llm = AsyncLLM(config=config)
    assert llm.config.max_model_len == 32
    assert AsyncLLM(config=llm.config).config is llm.config
    with pytest.raises(ConfigError):
        AsyncLLM(model, config=config)


async def test_an_idle_engine_keeps_no_timer(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nanoengine.async_llm._WATCH_INTERVAL", 0.01)
    await collect(llm, [1])
    await until_async(lambda: llm._watchdog is None)


async def test_a_finished_request_leaves_nothing_behind(llm: AsyncLLM) -> None:
    async def leave(prompt: list[int]) -> None:
        async for _ in llm.generate(prompt, LONG):
            break

    await asyncio.gather(*(collect(llm, [n], LONG) for n in range(20)), *(leave([n]) for n in range(20)))
    await until_async(lambda: llm.num_unfinished == 0)

    def nothing_is_left() -> bool:
        gc.collect()
        kept = (RequestJournal, IncrementalDetokenizer)
        return not any(issubclass(type(thing), kept) for thing in gc.get_objects())

    await until_async(nothing_is_left)  # the loop itself holds what it ran last


# --- a look at the engine ---


async def test_several_who_look_at_once_ask_the_scheduler_once(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    views = await asyncio.gather(*(llm.engine_view() for _ in range(5)))
    assert await llm.engine_view() is views[0]
    assert all(view is views[0] for view in views)
    assert sum(isinstance(message, StateRequest) for message in process.received) == 1
    await asyncio.sleep(STATE_INTERVAL + 0.05)
    assert await llm.engine_view() is not views[0]
    assert sum(isinstance(message, StateRequest) for message in process.received) == 2


async def test_nobody_asks_for_the_state_unless_somebody_looks(llm: AsyncLLM, process: FakeEngineProcess) -> None:
    await collect(llm, [1, 2], LONG)
    assert not [message for message in process.received if isinstance(message, StateRequest)]
    view = await llm.engine_view()
    assert view.latencies.ttft.count == view.latencies.tpot.count == 1


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
async def test_a_look_fails_with_the_engine_and_with_its_silence(
    llm: AsyncLLM, process: FakeEngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanoengine.async_llm.STATE_TIMEOUT", 0.05)
    process.is_mute = True
    with pytest.raises(DeadlineError, match="did not tell its state"):
        await llm.engine_view()
    monkeypatch.setattr("nanoengine.async_llm.STATE_TIMEOUT", 30.0)
    looking = asyncio.create_task(llm.engine_view())
    await asyncio.sleep(0.02)
    process.die()
    with pytest.raises(EngineDeadError, match="signal 9"):
        await asyncio.wait_for(looking, PATIENCE)
    with pytest.raises(EngineDeadError):
        await llm.engine_view()
