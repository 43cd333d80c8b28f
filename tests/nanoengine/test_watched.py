"""No thread or task of ours dies in silence: an exception is put into each, and what follows is seen within 2 s."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import EngineError, RequestError, WorkerError
from nanoengine import AsyncLLM, grammar_compiler, processes, watched
from nanoengine.engine_process import EngineProcess
from nanoengine.executor import MultiprocessExecutor
from nanoengine.grammar_compiler import GrammarCompiler
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.nanoengine.dying_threads import INJECTED, fail
from tests.nanoengine.fake_engine import ENDLESS, FakeEngineProcess, collect
from tests.nanoengine.test_executor import EPOCH, Make, make
from tests.nanoengine.test_llm_async import LONG
from tests.waiting import until, until_async

__all__ = ["make"]  # a fixture

SECONDS = 10.0
"""What is promised is 2 s; on a busy machine it may take five times as long."""


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Who died, as the log has it; each with its traceback."""
    records = [record for record in caplog.records if record.name == "nanoengine.watched"]
    assert all(record.levelno == logging.CRITICAL and record.exc_info for record in records)
    return [record.getMessage() for record in records]


# -- the mechanism ----------------------------------------------------------------------------------------------


def test_a_thread_that_raises_has_a_consequence_and_one_that_returns_has_none(caplog: pytest.LogCaptureFixture) -> None:
    deaths: list[BaseException] = []
    watched.start_thread(lambda: None, "ends", deaths.append).join(SECONDS)
    assert deaths == []
    watched.start_thread(fail, "fails", deaths.append).join(SECONDS)
    assert [str(each) for each in deaths] == [INJECTED]
    assert logged(caplog) == [f"the thread 'fails' died: RuntimeError: {INJECTED}"]


async def test_a_task_that_raises_has_a_consequence_and_one_that_is_cancelled_has_none(
    caplog: pytest.LogCaptureFixture,
) -> None:
    deaths: list[BaseException] = []
    tasks = [asyncio.create_task(asyncio.sleep(seconds)) for seconds in (0, 60)]
    tasks.append(asyncio.create_task(asyncio.to_thread(fail)))
    for task in tasks:
        watched.watch(task, "a task", deaths.append)
    tasks[1].cancel()
    await asyncio.wait(tasks, timeout=SECONDS)
    with ThreadPoolExecutor(1) as pool:
        watched.watch(pool.submit(fail), "some work", deaths.append)
    assert [str(each) for each in deaths] == [INJECTED] * 2
    assert logged(caplog) == [f"{what} died: RuntimeError: {INJECTED}" for what in ("a task", "some work")]


# -- the thread that spawns, in any process -----------------------------------------------------------------------


def test_what_waits_for_a_dead_spawner_fails_and_the_next_one_has_another(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = processes.in_lasting_thread(threading.current_thread)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "pthread_sigmask", fail)
        with pytest.raises(OSError, match="the thread that starts processes died"):
            processes.in_lasting_thread(threading.get_ident)
    assert processes.in_lasting_thread(threading.current_thread) is not first
    first.join(SECONDS)
    assert not first.is_alive()
    assert logged(caplog) == [f"the thread 'spawner' died: RuntimeError: {INJECTED}"]


# -- a rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "name"), [("heartbeat", "heartbeat"), ("library", "native pool")])
def test_a_rank_whose_thread_dies_ends_and_the_group_fails(
    make: Make, capfd: pytest.CaptureFixture[str], what: str, name: str
) -> None:
    executor = make(f"{what}@1")
    executor._entry = "tests.nanoengine.dying_threads:run_worker"
    with pytest.raises(WorkerError, match=r"rank 1 died \(exit code 1\)") as caught:
        start_and_watch(executor)
    assert (caught.value.rank, caught.value.reason) == (1, "died")
    said = capfd.readouterr().err
    assert f"the thread {name!r} died: RuntimeError: {INJECTED}" in said
    assert "Traceback" in said


def start_and_watch(executor: MultiprocessExecutor) -> None:
    executor.start(EPOCH)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        executor.watch()
        time.sleep(0.05)


# -- the scheduler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["death pipe", "native pool"])
def test_a_scheduler_whose_thread_dies_ends_and_its_owner_notices(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setenv("NANO_TEST_DYING", name)
    process = EngineProcess(EngineConfig.create(), module="tests.nanoengine.dying_threads")
    process.start()
    try:
        until(lambda: process.failure() is not None)
        failure = process.failure()
    finally:
        process.stop()
    assert failure is not None
    assert "exit code 1" in failure.message
    said = capfd.readouterr().err
    assert f"the thread {name!r} died: RuntimeError: {INJECTED}" in said
    assert "Traceback" in said


# -- a front end ----------------------------------------------------------------------------------------------------


class _Brittle(dict[Any, Any]):
    __delitem__ = fail


def break_socket(llm: AsyncLLM) -> None:
    llm._link._connection.pump = fail  # type: ignore[union-attr,method-assign]


def break_look(llm: AsyncLLM) -> None:
    llm._engine.look = fail  # type: ignore[method-assign]
    os.write(llm._engine._wake_write, b"x")  # type: ignore[attr-defined]


def break_waking(llm: AsyncLLM) -> None:
    llm._to_wake = _Brittle()


def break_watching(llm: AsyncLLM) -> None:
    llm._client.watch = fail  # type: ignore[union-attr,method-assign]


@pytest.mark.parametrize(
    ("break_it", "name"),
    [
        (break_socket, "AsyncLink.pump"),
        (break_look, "AsyncLink.look"),
        (break_waking, "AsyncLLM._wake_some"),
        (break_watching, "AsyncLLM._watch"),
    ],
)
async def test_a_front_end_whose_callback_fails_ends_its_streams_and_says_that_it_is_dead(
    llm: AsyncLLM,
    process: FakeEngineProcess,
    caplog: pytest.LogCaptureFixture,
    break_it: Callable[[AsyncLLM], None],
    name: str,
) -> None:
    process.tokens_of = lambda _: ENDLESS
    streams = [asyncio.create_task(collect(llm, [1, 2], LONG)) for _ in range(2)]
    process.hold.set()  # nobody gets a last token
    await until_async(lambda: llm.num_unfinished == 2)
    break_it(llm)
    process.hold.clear()
    began = time.monotonic()
    for each in await asyncio.gather(*streams, return_exceptions=True):
        if isinstance(each, BaseException):
            error = str(each)
        else:
            assert each[-1].outputs[0].finish_reason == "error"
            error = each[-1].outputs[0].error or ""
        assert f"the front end failed: RuntimeError: {INJECTED}" in error
    assert time.monotonic() - began < SECONDS
    assert not llm.is_ready
    assert INJECTED in str(llm.failure)
    assert logged(caplog) == [f"{name} died: RuntimeError: {INJECTED}"]
    with pytest.raises(EngineError, match=INJECTED):
        await collect(llm, [1, 2], LONG)


async def test_an_engine_that_nobody_watches_any_more_is_dead(
    llm: AsyncLLM, process: FakeEngineProcess, caplog: pytest.LogCaptureFixture
) -> None:
    process.hold.set()
    stream = asyncio.create_task(collect(llm, [1, 2], LONG))
    await until_async(lambda: llm.num_unfinished == 1)
    process.failure = fail  # type: ignore[method-assign]  # what the thread asks at least once a second
    with pytest.raises(EngineError, match=f"nobody watches the scheduler any more: RuntimeError: {INJECTED}"):
        await asyncio.wait_for(stream, SECONDS)
    assert not llm.is_ready
    assert logged(caplog) == [f"the thread 'scheduler-keeper' died: RuntimeError: {INJECTED}"]


# -- the grammar compiler -------------------------------------------------------------------------------------------


@pytest.fixture
def compiler() -> Any:
    compiler = GrammarCompiler(EngineConfig.create().resolve())
    yield compiler
    compiler.close()


def test_a_grammar_whose_compilation_breaks_off_is_an_error(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiler, "_remember", fail)  # behind everything that is caught there
    future = compiler.compile(StructuredOutputsParams(regex="a+"))
    with pytest.raises(EngineError, match=f"compiling structured_outputs failed: RuntimeError: {INJECTED}"):
        future.result(30)
    assert logged(caplog) == [f"compiling a grammar died: RuntimeError: {INJECTED}"]
    monkeypatch.undo()
    assert compiler.compile(StructuredOutputsParams(regex="b+")).result(30)


def test_a_compiler_whose_thread_dies_ends_and_the_next_grammar_has_another(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "dying_compiler.py").write_text(
        "from nanoengine import grammar_process\n"
        "from tests.nanoengine.dying_threads import fail\n"
        "grammar_process._answer = fail\n"
        "grammar_process.main()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.getcwd()}")
    with monkeypatch.context() as patch:
        patch.setattr(grammar_compiler, "MODULE", "dying_compiler")
        with pytest.raises(RequestError, match="too complex"):
            compiler.compile(StructuredOutputsParams(regex="a+")).result(30)
    assert compiler.compile(StructuredOutputsParams(regex="b+")).result(30)
