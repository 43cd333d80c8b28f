"""Scheduler processes that are gone are replaced, whichever way they went, and leave nothing; these do not compute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.engine import EngineConfig
from configs.errors import CheckpointError, DeadlineError, EngineDeadError, EngineError
from nanoengine.scheduler_keeper import SchedulerKeeper
from tests.nanoengine.process_tools import alive, descendants, open_descriptors
from tests.nanoengine.test_engine_process import MODULE, base, expect_nothing_left, read_pids, runs
from tests.waiting import PATIENCE, until

__all__ = ["base"]  # a fixture

Make = Callable[..., SchedulerKeeper]


@pytest.fixture
def make(base: Path) -> Iterator[Make]:
    made: list[SchedulerKeeper] = []
    before = set(descendants())

    def make(what: str = "", tp: int = 1, **settings: Any) -> SchedulerKeeper:
        config = EngineConfig.create(model=f"fake:{what}", tensor_parallel_size=tp, **settings)
        made.append(SchedulerKeeper(config, module=MODULE))
        return made[-1]

    yield make
    for keeper in made:
        keeper.stop()
        keeper.stop()
        assert keeper.look().is_final
    assert set(descendants()) <= before


def serving(keeper: SchedulerKeeper, incarnation: int) -> bool:
    condition = keeper.look()
    assert not condition.is_final, condition
    return condition.serves and condition.incarnation == incarnation


def started(keeper: SchedulerKeeper) -> SchedulerKeeper:
    keeper.start()
    assert not keeper.look().serves
    keeper.wait_ready(PATIENCE)
    assert serving(keeper, 1)
    return keeper


def pids_after(base: Path, before: list[int]) -> list[int]:
    """Those of the next scheduler and its ranks."""
    until(lambda: read_pids(base, len(before) - 1)[0] != before[0])
    return read_pids(base, len(before) - 1)


@pytest.mark.parametrize(
    ("number", "reason", "message"),
    [
        (signal.SIGKILL, "died", r"killed by signal 9 \(SIGKILL\)"),
        (signal.SIGTERM, "died", "ended: exit code 0"),
        (signal.SIGSTOP, "stopped", "was stopped by a signal"),
    ],
)
def test_one_that_is_gone_is_replaced_and_takes_its_ranks_along(
    make: Make, base: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    number: signal.Signals, reason: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("nanoengine.scheduler_keeper.STOPPED_SECONDS", 0.5)
    keeper = started(make(tp=2))
    first, before, address = read_pids(base), os.listdir(keeper.run_dir), keeper.look().address
    os.kill(keeper.pid, number)
    until(lambda: not keeper.look().serves)
    assert keeper.look().incarnation == 1
    until(lambda: serving(keeper, 2))
    second = pids_after(base, first)
    until(lambda: alive(first) == [])
    assert len(alive(second)) == 3
    assert keeper.look().address != address
    assert sorted(before) == ["1", "lock"]
    assert sorted(os.listdir(keeper.run_dir)) == ["2", "lock"]
    stats = keeper.look().restarts
    assert stats.restarts == {reason: 1}
    assert stats.seconds == stats.last_seconds > 0
    if number == signal.SIGSTOP:
        assert "Current thread" in capfd.readouterr().err, "the log says where it stood"


def test_the_cause_is_told_while_there_is_none(make: Make) -> None:
    keeper = started(make())
    os.kill(keeper.pid, signal.SIGKILL)
    until(lambda: keeper.look().cause is not None)
    cause = keeper.look().cause
    assert isinstance(cause, EngineDeadError)
    assert "killed by signal 9 (SIGKILL)" in cause.message
    assert keeper.look().address == ""


def test_one_that_hangs_is_replaced_once_however_many_say_so(make: Make) -> None:
    keeper = started(make())
    for _ in range(3):
        keeper.replace(1, DeadlineError("it has not said anything for 30 s"))
    until(lambda: serving(keeper, 2))
    keeper.replace(1, DeadlineError("who comes late means the first"))
    time.sleep(1.2)  # a look of the thread that watches, and more
    assert serving(keeper, 2)
    assert keeper.look().restarts.restarts == {"silent": 1}


def test_one_that_is_killed_while_it_starts_again_is_replaced_too(make: Make) -> None:
    keeper = started(make())
    first = keeper.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: keeper.pid != first)
    os.kill(keeper.pid, signal.SIGKILL)
    until(lambda: serving(keeper, 3))
    assert keeper.look().restarts.restarts == {"died": 1, "start": 1}


def test_one_that_raises_is_replaced_until_that_is_pointless(make: Make, base: Path) -> None:
    keeper = started(make("failure-when-told", max_restarts=2))
    (base / "pids.fail").touch()
    until(lambda: keeper.look().is_final)
    condition = keeper.look()
    assert condition.restarts.restarts["raised"] >= 1
    assert condition.restarts.restarts.total() == 2, "the next two may seem to fail as they start"
    assert isinstance(condition.cause, EngineError)
    assert condition.cause.message == (
        "RuntimeError: out of luck; 2 schedulers in its place within 60 s brought no token"
    )
    until(lambda: alive(read_pids(base, 1)) == [])


def test_what_keeps_the_first_one_from_starting_is_raised_and_not_tried_again(make: Make, base: Path) -> None:
    keeper = make("checkpoint-error")
    keeper.start()
    with pytest.raises(CheckpointError, match="no weights in /nowhere"):
        keeper.wait_ready(PATIENCE)
    assert keeper.look().incarnation == 0
    assert len(runs(base)) == 1
    keeper.stop()
    assert runs(base) == []


@pytest.mark.parametrize("settings", [{"max_restarts": 0}])
def test_without_restarts_its_end_is_final(make: Make, settings: dict[str, Any]) -> None:
    keeper = started(make(**settings))
    os.kill(keeper.pid, signal.SIGKILL)
    until(lambda: keeper.look().is_final)
    assert str(keeper.look().cause).endswith("killed by signal 9 (SIGKILL)")
    assert keeper.look().restarts.restarts == Counter()


def test_a_stop_in_the_middle_of_a_restart_leaves_nothing(make: Make, base: Path) -> None:
    keeper = started(make())
    first = keeper.pid
    os.kill(first, signal.SIGKILL)
    until(lambda: keeper.pid != first)
    second = keeper.pid
    keeper.stop()
    assert alive([first, second]) == []
    assert runs(base) == []
    until(lambda: keeper._thread is not None and not keeper._thread.is_alive())
    assert alive([keeper.pid]) == []


def test_descriptors_and_memory_do_not_grow_with_restarts(make: Make) -> None:
    """The fixture looks into /dev/shm."""
    keeper = started(make())
    counts = [len(open_descriptors())]
    for number in range(2, 7):
        os.kill(keeper.pid, signal.SIGKILL)
        # None of these brings a token, and only the first five of them may follow each other.
        until(lambda number=number: serving(keeper, number))  # type: ignore[misc]
        # ZeroMQ may still close, in a thread of its own, what tests before left: that must not hide one of ours.
        counts.append(len(open_descriptors()))
    assert counts[-1] == min(counts)
    os.kill(keeper.pid, signal.SIGKILL)
    until(lambda: keeper.look().is_final)


OWNER = """
import os, signal, time
from configs.engine import EngineConfig
from nanoengine.scheduler_keeper import SchedulerKeeper
keeper = SchedulerKeeper(EngineConfig.create(model="fake:"), module="tests.nanoengine.fake_scheduler")
keeper.start()
keeper.wait_ready()
os.kill(keeper.pid, signal.SIGKILL)
while keeper.look().incarnation == 1:
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_outlives_an_owner_whose_scheduler_was_replaced(base: Path) -> None:
    """The next scheduler removes the whole directory then, not only its own part."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
        pids = read_pids(base, 1)
        owner.kill()
        expect_nothing_left(base, pids)
    finally:
        owner.kill()
        owner.communicate()
