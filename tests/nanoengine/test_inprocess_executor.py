"""The executor without processes: the same contract, in the caller's thread or with ranks as threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from configs.engine import EngineConfig
from configs.errors import ConfigError, DeadlineError, EngineError, WorkerError
from nanoengine.executor import ExecutorFacts, MultiprocessExecutor, create_executor
from nanoengine.inprocess_executor import InProcessExecutor
from tests.nanoengine.fake_worker import GATE, FakeRank, invented
from tests.nanoengine.process_tools import open_descriptors
from tests.nanoengine.test_executor import EPOCH, step
from tests.waiting import eventually

Make = Callable[..., InProcessExecutor]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[InProcessExecutor] = []
    descriptors = open_descriptors()

    def make(what: str = "", tp: int = 1, **settings: Any) -> InProcessExecutor:
        config = EngineConfig.create(model=f"fake:{what}", tensor_parallel_size=tp, executor="inprocess", **settings)
        made.append(InProcessExecutor(config, entry="tests.nanoengine.fake_worker:create_ranks"))
        return made[-1]

    yield make
    for executor in made:
        executor.stop()
        executor.stop()
    assert eventually(lambda: len(open_descriptors()) <= len(descriptors))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_two_steps_in_flight_come_back_in_order(make: Make, tp: int) -> None:
    executor = make(tp=tp)
    assert executor.start(EPOCH) == ExecutorFacts({1: 100, 2: 70, 4: 70}[tp], "float32", "cpu", 6)
    executor.submit(step(1))
    for step_id in range(2, 20):
        executor.submit(step(step_id))
        assert executor.num_in_flight == 2
        assert executor.collect(None) == invented(step(step_id - 1))
    assert executor.collect(None) == invented(step(19))
    assert executor.collect(None) is None
    executor.watch()


@pytest.mark.parametrize("tp", [1, 2])
def test_a_poll_wakes_exactly_when_there_is_something_to_collect(make: Make, tp: int) -> None:
    executor = make(tp=tp)
    executor.start(EPOCH)
    poller = zmq.Poller()
    for source in executor.wait_fds():
        poller.register(source, zmq.POLLIN)
    assert poller.poll(0) == []
    executor.submit(step(1))
    assert poller.poll(2000)
    assert executor.collect(1) == invented(step(1))
    assert poller.poll(0) == []


def test_one_rank_runs_in_the_calling_thread(make: Make) -> None:
    executor = make()
    executor.start(EPOCH)
    threads = threading.active_count()
    executor.submit(step(1))
    executor.collect(None)
    assert threading.active_count() == threads


@pytest.mark.parametrize("tp", [1, 2])
def test_what_a_rank_raises_is_raised_here(make: Make, tp: int) -> None:
    with pytest.raises(ConfigError, match="must be odd"):
        make(f"config-error@{tp - 1}", tp=tp).start(EPOCH)
    with pytest.raises(WorkerError, match=f"rank {tp - 1} failed: RuntimeError: no such luck"):
        make(f"raise-loading@{tp - 1}", tp=tp).start(EPOCH)
    executor = make(f"raise@{tp - 1}", tp=tp)
    executor.start(EPOCH)
    for step_id in (1, 2):
        executor.submit(step(step_id))
    assert executor.collect(None) == invented(step(1))
    for _ in range(2):
        with pytest.raises(WorkerError, match=f"rank {tp - 1} failed: ValueError: rank trouble"):
            executor.collect(None)
    with pytest.raises(WorkerError, match="rank trouble"):
        executor.watch()
    failed = executor._ranks[tp - 1]
    assert isinstance(failed, FakeRank)
    executor.stop()
    assert failed.aborted == (tp > 1)
    assert not failed.closed  # closing waits for the others


def test_a_thread_that_does_not_answer_is_named(make: Make) -> None:
    with pytest.raises(DeadlineError, match=r"waited 0\.2 s for rank 1"):
        make("hang-loading@1", tp=2, start_timeout=0.2).start(EPOCH)
    executor = make("hang@1", tp=2, step_timeout=0.2)
    executor.start(EPOCH)
    executor.submit(step(1))
    with pytest.raises(WorkerError, match=r"waited 0\.2 s for rank 1"):
        executor.collect(None)


def test_collect_does_not_wait_longer_than_asked_for_threads(make: Make) -> None:
    GATE.clear()
    executor = make("gated@0", tp=2)
    executor.start(EPOCH)
    executor.submit(step(1))
    begin = time.monotonic()
    assert executor.collect(0) is None
    assert time.monotonic() - begin < 1
    GATE.set()
    assert executor.collect(None) == invented(step(1))


@pytest.mark.parametrize("tp", [1, 2])
def test_stopping_lets_every_rank_leave(make: Make, tp: int) -> None:
    executor = make(tp=tp)
    executor.start(EPOCH)
    ranks = list(executor._ranks)
    executor.stop()
    assert all(isinstance(rank, FakeRank) and rank.closed for rank in ranks)
    with pytest.raises(EngineError):
        executor.submit(step(1))
    assert executor.wait_fds() == []


def test_the_setting_chooses_the_executor(tmp_path: Path) -> None:
    inprocess = EngineConfig.create(executor="inprocess")
    assert isinstance(create_executor(inprocess, tmp_path), InProcessExecutor)
    assert isinstance(create_executor(EngineConfig(), tmp_path), MultiprocessExecutor)
