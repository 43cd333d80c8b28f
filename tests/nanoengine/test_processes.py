"""The ties between processes, one at a time; together they are tested in test_engine_process.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from nanoengine import processes
from tests.nanoengine.process_tools import alive
from tests.waiting import eventually


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "still running"),
        (0, "exit code 0"),
        (7, "exit code 7"),
        (-9, "killed by signal 9 (SIGKILL)"),
        (-63, "killed by signal 63"),
    ],
)
def test_exit_codes_in_words(code: int | None, words: str) -> None:
    assert processes.describe_exit(code) == words


def test_the_spawning_thread_outlives_its_callers_and_blocks_ctrl_c() -> None:
    names = set()
    masks = []

    def call() -> None:
        names.add(threading.get_ident())
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, set()))

    processes.in_lasting_thread(resource_tracker.ensure_running)  # unblocks SIGINT in the thread that calls it
    threads = [threading.Thread(target=processes.in_lasting_thread, args=(call,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 1
    assert names <= {thread.ident for thread in threading.enumerate()}
    assert all(signal.SIGINT in mask for mask in masks)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def test_the_spawning_thread_hands_exceptions_back() -> None:
    with pytest.raises(ZeroDivisionError):
        processes.in_lasting_thread(lambda: 1 // 0)
    assert processes.in_lasting_thread(lambda: 2) == 2


def test_the_end_of_a_pipe_is_noticed() -> None:
    read_fd, write_fd = os.pipe()
    ended = threading.Event()
    processes.on_end_of(read_fd, ended.set, "test")
    assert not ended.wait(0.1)
    os.close(write_fd)
    assert ended.wait(30)
    os.close(read_fd)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd is Linux's")
def test_registered_children_are_killed_and_forgotten_ones_are_not() -> None:
    children = [subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2)]
    sentinels = [os.pidfd_open(child.pid) for child in children]
    try:
        for child, sentinel in zip(children, sentinels, strict=True):
            processes.register_child(child.pid, sentinel)
        doomed, spared = [child.pid for child in children]
        processes.forget_child(spared)
        processes.kill_children()
        assert alive([doomed, spared]) == [spared]
        processes.forget_child(doomed)
    finally:
        for child, sentinel in zip(children, sentinels, strict=True):
            child.kill()
            child.communicate()
            os.close(sentinel)


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_parent_that_is_gone_already_is_noticed() -> None:
    """Between fork and prctl the parent may have died, and no signal will ever come."""
    script = "import signal; from nanoengine.processes import *; print(set_death_signal(signal.SIGTERM, {pid}))"
    for pid, answer in (("os.getppid()", "True"), ("1 << 30", "False")):
        code = "import os; " + script.format(pid=pid)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == answer + "\n"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_process_shows_its_name() -> None:
    code = "from nanoengine.processes import name_process; name_process('nano-worker-12345'); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as process:
        comm = Path(f"/proc/{process.pid}/comm")
        assert eventually(lambda: comm.read_text() == "nano-worker-123\n")
        process.communicate(b"\n")


@pytest.mark.parametrize(("asked", "share"), [(None, 4), ("2", 2), ("nonsense", 4)])
def test_ranks_share_the_cores_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, share: int
) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 9)
    for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert processes.limit_threads(2) == share
    assert os.environ["MKL_NUM_THREADS"] == str(share)
    assert processes.limit_threads(64) >= 1
