"""No task of the HTTP server dies in silence: an exception is put into each, and what follows is seen within 2 s."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest

from configs.errors import EngineError
from launch import supervisor
from launch.front_dir import FrontDir
from launch.front_end import FrontEnd
from launch.keys import ApiKeys
from launch.listener import listening
from launch.server import events, generation, streams
from launch.server.pacing import BEGIN_BATCH, BeginInTurns
from launch.server.shared_numbers import SharedNumbers
from tests.launch.fake_engine import FakeEngine, served
from tests.launch.test_server_metrics import Front
from tests.launch.test_server_streams import ASKED, RESUME
from tests.nanoengine.dying_threads import INJECTED
from tests.waiting import until_async

SECONDS = 10.0
"""What is promised is 2 s; on a busy machine it may take five times as long."""


async def fail(*_: Any) -> NoReturn:
    raise RuntimeError(INJECTED)


class LoadedEngine(FakeEngine):
    """One that is started and closed; it loads until `loaded` is set."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        super().__init__(folder, **settings)
        self.loaded = asyncio.Event()
        self.num_open = 0

    @property
    def num_unfinished(self) -> int:
        return self.num_open

    async def start(self) -> None:
        await self.loaded.wait()

    async def close(self) -> None:
        self.is_ready = False


# -- the server itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["loading", "ready", "draining"])
@pytest.mark.parametrize("how", [fail, lambda: asyncio.sleep(0)], ids=["raises", "returns"])
async def test_a_front_end_whose_http_server_ends_fails_in_each_phase(
    tmp_path: Path, phase: str, how: Callable[[], Awaitable[None]]
) -> None:
    engine, stop, ready = LoadedEngine(tmp_path), asyncio.get_running_loop().create_future(), asyncio.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        front = FrontEnd(engine, listener, ApiKeys(), stop, ready.set)  # type: ignore[arg-type]
        gate = asyncio.Event()

        async def serve(**_: Any) -> None:
            await gate.wait()
            await how()

        front._server.serve = serve  # type: ignore[method-assign, assignment]
        running = asyncio.create_task(front.run())
        if phase != "loading":
            engine.loaded.set()
            await ready.wait()
        if phase == "draining":
            engine.num_open = 1
            stop.set_result(None)
            await until_async(lambda: front._lifecycle.draining)
        gate.set()
        with pytest.raises((RuntimeError, EngineError)) as caught:
            await asyncio.wait_for(running, SECONDS)
    assert str(caught.value) == (INJECTED if how is fail else "the HTTP server ended by itself")


async def test_a_server_that_can_no_longer_be_stopped_ends_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = LoadedEngine(tmp_path)
    engine.loaded.set()
    monkeypatch.setattr(supervisor, "AsyncLLM", lambda config: engine)
    monkeypatch.setattr(supervisor, "guard_threads", lambda on_death: None)
    config = engine.config
    with listening(config.server, False, 1) as listeners, supervisor.Signals() as signals:
        signals.wait = fail  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=INJECTED):
            await asyncio.wait_for(supervisor._serve(config, listeners, ApiKeys(), signals), SECONDS)
    assert f"the task that waits for signals died: RuntimeError: {INJECTED}" in caplog.text


# -- the tasks of one request ---------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    engine = FakeEngine(tmp_path)
    engine.delay = 0.05
    return engine


async def test_a_stream_whose_signs_of_life_fail_breaks_off(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events.EventStream, "_ping", fail)
    with served(engine) as url:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
            with pytest.raises(httpx.RemoteProtocolError):
                await client.post("/v1/completions", json=ASKED)
            await until_async(lambda: not engine.open)
    assert INJECTED in caplog.text


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_can_no_longer_see_its_client_go_is_a_500(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    monkeypatch.setattr(generation, "hang_up", fail)
    with served(engine) as url:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
            assert (await client.post("/v1/completions", json=ASKED | {"stream": stream})).status_code == 500
            await until_async(lambda: not engine.open)
    assert INJECTED in caplog.text


async def test_a_kept_stream_that_fails_at_its_very_end_lets_its_reader_go(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after = 10

    def raises(*_: object) -> NoReturn:
        raise RuntimeError(INJECTED)

    monkeypatch.setattr(streams, "error_events", raises)
    with served(engine) as url:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
            answer = await client.post("/v1/completions", json=ASKED, headers=RESUME)
    assert "internal error" in answer.text
    assert answer.text.endswith("data: [DONE]\n\n")
    assert INJECTED in caplog.text


@pytest.mark.parametrize("error", [RuntimeError(INJECTED), EngineError(INJECTED)])
async def test_one_of_several_prompts_that_fails_fails_the_request(
    engine: FakeEngine, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = engine.generate

    async def generate(prompt: Any, params: Any, request_id: str, **more: Any) -> AsyncGenerator[Any, None]:
        if request_id.endswith("-1"):
            raise error
        async for output in real(prompt, params, request_id, **more):
            yield output

    monkeypatch.setattr(engine, "generate", generate)
    with served(engine) as url:
        async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:
            answer = await client.post("/v1/completions", json={"prompt": ["a", "b", "c"]})
            await until_async(lambda: not engine.open)
    assert answer.status_code == 500


class _Brittle(deque[Any]):
    def popleft(self) -> NoReturn:
        raise RuntimeError(INJECTED)


async def test_requests_whose_turn_does_not_come_begin_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    begun: list[object] = []

    async def app(*_: object) -> None:
        begun.append(None)

    turns = BeginInTurns(app)
    turns._waiting = _Brittle()
    scope = {"type": "http", "path": "/v1/completions"}
    async with asyncio.timeout(SECONDS):
        await asyncio.gather(*(turns(scope, fail, fail) for _ in range(3 * BEGIN_BATCH)))
        await turns(scope, fail, fail)
    assert len(begun) == 3 * BEGIN_BATCH + 1
    assert f"BeginInTurns._next_turn died: RuntimeError: {INJECTED}" in caplog.text


# -- numbers that front ends tell each other -----------------------------------------------------------------------


async def test_numbers_that_could_not_be_written_once_are_written_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    front_dir = FrontDir(tmp_path, "1")
    front = Front(tmp_path, front_dir)
    tried = asyncio.Event()

    def write(_: SharedNumbers) -> None:
        monkeypatch.undo()
        tried.set()
        raise RuntimeError(INJECTED)

    monkeypatch.setattr(SharedNumbers, "write", write)
    caplog.set_level(logging.ERROR, "asyncio")
    front.add()  # open from now on
    await asyncio.wait_for(tried.wait(), SECONDS)
    async with front.http:
        await until_async(lambda: any(front_dir.metrics.iterdir()))
    assert INJECTED in caplog.text
