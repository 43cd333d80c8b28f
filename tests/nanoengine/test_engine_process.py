"""The scheduler process and its ranks end with their owner, whichever way it ends, and leave nothing behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from configs.engine import EngineConfig
from configs.errors import CheckpointError, DeadlineError, EngineDeadError, EngineError, NanoEngineError
from nanoengine.engine_process import EngineProcess
from nanoengine.run_dir import RunDir
from tests.nanoengine.process_tools import alive, descendants, leaked_memory, shared_memory, short_directory
from tests.waiting import eventually

MODULE = "tests.nanoengine.fake_scheduler"
Make = Callable[..., EngineProcess]


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where run directories are made, for this test alone; it ends up empty, and so does /dev/shm."""
    memory = shared_memory()
    with short_directory() as path:
        (path / "runs").mkdir(mode=0o700)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path / "runs"))
        monkeypatch.setenv("NANO_TEST_PIDS", str(path / "pids"))
        yield path
        assert eventually(lambda: os.listdir(path / "runs") == []), os.listdir(path / "runs")
        assert eventually(lambda: not leaked_memory(memory), 5), leaked_memory(memory)


@pytest.fixture
def make(base: Path) -> Iterator[Make]:
    made: list[EngineProcess] = []
    before = set(descendants())

    def make(what: str = "", incarnation: int = 1, tp: int = 2, **settings: Any) -> EngineProcess:
        config = EngineConfig.create(model=f"fake:{what}", tensor_parallel_size=tp, **settings)
        made.append(EngineProcess(config, incarnation, module=MODULE))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
        engine.stop()
    assert set(descendants()) <= before


def read_pids(base: Path, num_ranks: int = 2) -> list[int]:
    """Pids of the scheduler and its ranks, once all of them exist."""
    assert eventually((base / "pids").exists)
    pids: list[int] = json.loads((base / "pids").read_text())
    assert len(pids) == 1 + num_ranks
    return pids


def start_and_list(base: Path) -> list[str]:
    """What a start, which sweeps, leaves of the run directories of others."""
    RunDir.create().remove()
    return runs(base)


def runs(base: Path) -> list[str]:
    return os.listdir(base / "runs")


# -------------------------------------------------------------------------------------------------- start


def test_the_scheduler_gets_its_configuration_and_nothing_secret_is_in_sight(make: Make, base: Path) -> None:
    engine = make("echo", incarnation=4, block_size=48, api_key="sesame")
    engine.start()
    engine.wait_ready(60)
    told = json.loads((base / "pids").read_text())
    config = EngineConfig.from_dict(told["config"])
    assert (config.cache.block_size, config.server.api_key, told["incarnation"]) == (48, (), 4)
    assert (told["front_address"], told["stdin"]) == (engine.address, "")
    assert engine.address == f"ipc://{told['run_dir']}/front"
    assert "sesame" not in json.dumps(told)
    # 0, 1, 2, the death pipe, the status pipe, the lock, and the listing itself
    assert len(told["descriptors"]) == 7
    assert os.stat(told["run_dir"]).st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("checkpoint-error", CheckpointError, "no weights in /nowhere"),
        ("die", EngineDeadError, r"ended: exit code 3"),
    ],
)
def test_a_start_that_fails_is_reported_at_once(
    make: Make, what: str, kind: type[NanoEngineError], message: str
) -> None:
    engine = make(what)
    engine.start()
    with pytest.raises(kind, match=message):
        engine.wait_ready(60)
    assert isinstance(engine.failure(), kind)


def test_a_stop_does_not_disturb_a_scheduler_that_ends_already(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    """Told why a start failed, its owner stops it; raised during the exit, that was "Exception ignored in atexit"."""
    engine = make("slow-exit")
    engine.start()
    with pytest.raises(CheckpointError):
        engine.wait_ready(60)
    engine.stop()
    assert engine._process is not None
    assert engine._process.returncode == 1
    assert capfd.readouterr().err == ""


def test_waiting_for_ready_has_a_deadline_and_can_be_tried_again(make: Make) -> None:
    engine = make("hang")
    engine.start()
    for _ in range(2):
        with pytest.raises(DeadlineError, match="not ready after"):
            engine.wait_ready(0.1)
    assert engine.failure() is None


def test_stopping_ends_a_wait_in_another_thread(make: Make) -> None:
    engine = make("hang")
    engine.start()
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            engine.wait_ready()
        except EngineError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    engine.stop()
    thread.join(30)
    assert [type(error) for error in caught] == [EngineDeadError]


def test_an_engine_outlives_the_thread_that_started_it(make: Make, base: Path) -> None:
    """PR_SET_PDEATHSIG fires when the spawning thread ends, not the process."""
    engine = make()
    thread = threading.Thread(target=engine.start)
    thread.start()
    thread.join()
    engine.wait_ready(60)
    time.sleep(0.3)
    assert engine.failure() is None
    assert len(alive(read_pids(base))) == 3


def test_two_engines_at_once_do_not_meet(make: Make, base: Path) -> None:
    first, second = make(tp=1), make("echo")
    first.start()
    pids = read_pids(base, num_ranks=1)
    second.start()
    second.wait_ready(60)
    first.wait_ready(60)
    assert first.address != second.address
    first.stop()
    assert alive(pids) == []
    assert second.failure() is None
    assert len(runs(base)) == 1


# -------------------------------------------------------------------------------------------------- end


@pytest.mark.parametrize("what", ["", "hang-loading@*"], ids=["ready", "loading"])
def test_stopping_ends_everything_within_three_seconds(make: Make, base: Path, what: str) -> None:
    engine = make(what)
    engine.start()
    pids = read_pids(base)
    if not what:
        engine.wait_ready(60)
    begin = time.monotonic()
    engine.stop()
    assert time.monotonic() - begin < 3
    assert alive(pids) == []
    assert runs(base) == []
    assert isinstance(engine.failure(), EngineDeadError)
    engine.stop()


def test_stopping_before_and_right_after_the_start(make: Make) -> None:
    make().stop()
    engine = make()
    engine.start()
    engine.stop()


def test_a_scheduler_that_ignores_sigterm_is_ended_all_the_same(make: Make, base: Path) -> None:
    engine = make("stuck")
    engine.start()
    engine.wait_ready(60)
    pids = read_pids(base)
    begin = time.monotonic()
    engine.stop(1.0)
    assert time.monotonic() - begin < 5
    assert alive(pids) == []


def test_a_frozen_scheduler_is_killed(make: Make, base: Path) -> None:
    engine = make()
    engine.start()
    engine.wait_ready(60)
    pids = read_pids(base)
    os.kill(engine.pid, signal.SIGSTOP)
    engine.stop(1.0)
    assert eventually(lambda: alive(pids) == [])


@pytest.mark.parametrize("what", ["", "hang-loading@*"], ids=["ready", "loading"])
def test_a_killed_scheduler_takes_its_ranks_along_and_wakes_its_owner(make: Make, base: Path, what: str) -> None:
    engine = make(what)
    engine.start()
    pids = read_pids(base)
    if not what:
        engine.wait_ready(60)
    assert engine.failure() is None
    os.kill(engine.pid, signal.SIGKILL)
    assert select.select([engine.fileno()], [], [], 30)[0]
    failure = engine.failure()
    assert isinstance(failure, EngineDeadError)
    assert "killed by signal 9 (SIGKILL)" in failure.message
    assert eventually(lambda: alive(pids) == [])
    engine.stop()
    assert runs(base) == []


def test_a_failure_after_ready_is_told_with_its_reason(make: Make) -> None:
    engine = make("late-failure")
    engine.start()
    assert eventually(lambda: engine.failure() is not None)
    failure = engine.failure()
    assert isinstance(failure, EngineError)
    assert failure.message == "RuntimeError: out of luck"


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # since Python 3.12
def test_a_forked_child_of_the_owner_does_not_end_the_engine(make: Make, base: Path) -> None:
    engine = make("echo")
    engine.start()
    engine.wait_ready(60)
    child = os.fork()
    if child == 0:
        engine.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert engine.failure() is None
    assert len(runs(base)) == 1


# -------------------------------------------------------------------------------------- the owner's own end

OWNER = """
import os, sys, time
from configs.engine import EngineConfig
from nanoengine.engine_process import EngineProcess
what, then = sys.argv[1:]
config = EngineConfig.create(model=what, tensor_parallel_size=2)
engine = EngineProcess(config, module="tests.nanoengine.fake_scheduler")
engine.start()
if then == "fork" and os.fork() == 0:
    time.sleep(600)
engine.wait_ready()
print("ready", flush=True)
if then == "raise":
    raise RuntimeError("user's mistake")
if then == "stop":
    print("stopping", flush=True)
    engine.stop(600)
if then != "leave":
    time.sleep(600)
"""


@pytest.fixture
def owner(base: Path) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Starts a program that owns an engine and knows nothing of cleaning up, in a process group of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str, then: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, what, then],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


Owner = Callable[[str, str], "subprocess.Popen[str]"]


def expect_nothing_left(base: Path, pids: list[int], within: float = 15) -> None:
    assert eventually(lambda: alive(pids) == [], within), f"{alive(pids)} of {pids} are left"
    assert eventually(lambda: runs(base) == [], 5)


@pytest.mark.parametrize("what", ["fake:", "fake:hang-loading@*"], ids=["ready", "loading"])
def test_nothing_outlives_an_owner_that_is_killed(owner: Owner, base: Path, what: str) -> None:
    process = owner(what, "sleep")
    pids = read_pids(base)
    process.kill()
    expect_nothing_left(base, pids)


def test_nothing_outlives_an_owner_that_is_killed_before_it_knows_its_engine(owner: Owner, base: Path) -> None:
    process = owner("fake:", "sleep")
    assert eventually(lambda: descendants(process.pid) != [])
    process.kill()
    # The scheduler is still importing: it finds out as soon as it looks.
    assert eventually(lambda: runs(base) == [])


def test_nothing_outlives_an_owner_that_is_killed_while_it_waits_for_its_engines_end(owner: Owner, base: Path) -> None:
    """It has asked the scheduler to end, and so been relied on to tidy up itself."""
    process = owner("fake:stuck", "stop")
    pids = read_pids(base)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "stopping\n"]
    time.sleep(0.5)  # until it has asked; the order does not matter
    process.kill()
    expect_nothing_left(base, pids)


def test_a_killed_owner_is_noticed_although_a_fork_of_it_holds_the_death_pipe(owner: Owner, base: Path) -> None:
    process = owner("fake:", "fork")
    pids = read_pids(base)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    forks = [child for child in psutil.Process(process.pid).children() if child.pid not in pids]
    process.kill()
    try:
        expect_nothing_left(base, pids)
    finally:
        for fork in forks:
            fork.kill()


def test_ctrl_c_while_loading_ends_everything(owner: Owner, base: Path) -> None:
    """It goes to the whole process group; scheduler and ranks leave it to the owner."""
    process = owner("fake:hang-loading@*", "sleep")
    pids = read_pids(base)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.count("Traceback") == 1, errors
    assert "KeyboardInterrupt" in errors
    expect_nothing_left(base, pids, within=0.1)


@pytest.mark.parametrize(("then", "code"), [("leave", 0), ("raise", 1)])
def test_an_owner_that_just_ends_ends_its_engine(owner: Owner, base: Path, then: str, code: int) -> None:
    process = owner("fake:", then)
    pids = read_pids(base)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.count("Traceback") == code, errors
    expect_nothing_left(base, pids, within=0.1)


def test_everything_killed_at_once_is_swept_by_the_next_start(owner: Owner, base: Path) -> None:
    process = owner("fake:", "sleep")
    pids = read_pids(base)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert eventually(lambda: alive(pids) == [])
    assert len(runs(base)) == 1
    # The last thread of a killed process may hold the lock for a moment longer than the process seems to live.
    assert eventually(lambda: start_and_list(base) == [])


def test_the_scheduler_is_not_for_starting_by_hand() -> None:
    done = subprocess.run([sys.executable, "-m", MODULE], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--bootstrap-fd" in done.stderr
    assert "Traceback" not in done.stderr
