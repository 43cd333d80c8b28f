"""What makes child processes die with their parents, whichever way those die; it knows no engine and no rank.

Linux does most of it (PR_SET_PDEATHSIG); pipes that reach their end when the other side dies do it everywhere.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import ctypes
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait as wait_for_sentinels
from typing import Any, NoReturn, TypeVar

from nanoengine.logs import formatter
from nanoengine.watched import start_thread

T = TypeVar("T")

STACK_SIGNAL = signal.SIGUSR1
"""Our processes write where their threads stand when they get it, before they are killed for hanging."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def set_death_signal(number: signal.Signals, parent_pid: int) -> bool:
    """Ask the kernel for signal `number` when the parent dies; False when it has died already.

    It fires when the *thread* that spawned this process ends, hence `in_lasting_thread`. On other systems than
    Linux nothing is asked for; the pipe of `on_end_of` then is the only tie.
    """
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    return os.getppid() == parent_pid


def name_process(name: str) -> None:
    """Show `name` (at most 15 characters) in ps and top."""
    if sys.platform == "linux":
        _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))


def _prctl(option: int, value: object) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def is_stopped(pid: int | None) -> bool:
    """Whether a signal or a tracer has stopped the process; False where that cannot be seen (no /proc)."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat", "rb") as file:
        return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    return False


def ignore_interrupts() -> None:
    """Leave Ctrl-C, which goes to the whole foreground group, to the process that talks to the user."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # `in_lasting_thread` spawned us with it blocked


def on_end_of(fd: int, call: Callable[[], None], name: str, on_word: Callable[[], None] | None = None) -> None:
    """Start a daemon thread that waits for the end of pipe `fd` and then calls `call`.

    Should the other side write anything into it, `on_word` is called. A process that can no longer see the end of its
    owner ends itself.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1):
                if on_word is not None:
                    on_word()
        call()

    start_thread(wait, name, end_process)


def end_process(error: BaseException) -> NoReturn:
    """End this process and its children at once, with code 1: what must not die in it has died, as the log says.

    Whoever owns it notices that, and has a way to go on.
    """
    kill_children()
    os._exit(1)


def describe_exit(code: int | None) -> str:
    """An exit code as subprocess and multiprocessing give it, in words."""
    if code is None:
        return "still running"
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return f"killed by signal {-code}"


class _LastingThread:
    """A daemon thread that runs calls one at a time until the process ends.

    Should it die all the same, what was to run in it raises, and `in_lasting_thread` starts another one. The kernel
    ends the children that it has spawned, and whoever owns those notices that.
    """

    def __init__(self) -> None:
        self.pid, self.is_dead = os.getpid(), False
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # nothing is queued behind the thread's end
        self._running: concurrent.futures.Future[Any] | None = None
        start_thread(self._run, "spawner", self._die)

    def _run(self) -> None:
        while True:
            call, self._running = self._calls.get()
            # Inherited by what is spawned here: a Ctrl-C must not hit a child before it has chosen to ignore it.
            # Each time, because multiprocessing unblocks it when it has started its resource tracker.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                result = call()
            except BaseException as error:
                self._running.set_exception(error)
            else:
                self._running.set_result(result)
            self._running = None

    def _die(self, error: BaseException) -> None:
        with self._lock:
            self.is_dead = True
            futures = [self._running] if self._running is not None else []
            while not self._calls.empty():
                futures.append(self._calls.get()[1])
        for future in futures:
            future.set_exception(OSError(f"the thread that starts processes died: {error}"))

    def run(self, call: Callable[[], T]) -> T:
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self.is_dead:
                raise OSError("the thread that starts processes died")
            self._calls.put((call, future))
        try:
            concurrent.futures.wait([future])
        except BaseException:  # Ctrl-C, SIGTERM: let the spawn finish, or nobody would know of the child
            concurrent.futures.wait([future], timeout=10)
            raise
        return future.result()


_lasting_thread: _LastingThread | None = None
_lasting_thread_lock = threading.Lock()


def in_lasting_thread(call: Callable[[], T]) -> T:
    """Run `call` in a thread that lives as long as this process, and return its result.

    Whatever spawns a child with a death signal goes through here: the caller may be a thread that ends.
    """
    global _lasting_thread
    with _lasting_thread_lock:
        # A fork does not copy threads.
        if _lasting_thread is None or _lasting_thread.is_dead or _lasting_thread.pid != os.getpid():
            _lasting_thread = _LastingThread()
        thread = _lasting_thread
    return thread.run(call)


# (our pid, its pid) → sentinel of each child that must not outlive this process; a fork of us has no claim on them.
_children: dict[tuple[int, int], int] = {}


def register_child(pid: int, sentinel: int) -> None:
    """Remember a child for `kill_children`; `sentinel` becomes readable when it has ended."""
    _children[os.getpid(), pid] = sentinel


def forget_child(pid: int) -> None:
    """The child has been reaped: its pid may soon be somebody else's."""
    _children.pop((os.getpid(), pid), None)


def kill_children(timeout: float = 1.0) -> None:
    """SIGKILL and reap every registered child; for the last moments of a process, from any of its threads."""
    children = {pid: sentinel for (owner, pid), sentinel in list(_children.items()) if owner == os.getpid()}
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline, alive = time.monotonic() + timeout, list(children.values())
    while alive and (left := deadline - time.monotonic()) > 0:
        for sentinel in wait_for_sentinels(alive, left):
            alive.remove(sentinel)  # type: ignore[arg-type]
    for pid, sentinel in children.items():
        with contextlib.suppress(ChildProcessError):  # reaped already, by another thread
            os.waitpid(pid, os.WNOHANG if sentinel in alive else 0)


# multiprocessing waits at exit, without end, for children that nobody has stopped; this runs before it does.
atexit.register(kill_children)


def num_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def limit_threads(num_ranks: int) -> int:
    """This rank's share of the cores, put into the environment for OpenMP and BLAS before they are loaded.

    A user's own OMP_NUM_THREADS wins.
    """
    share = max(1, num_cores() // num_ranks)
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        share = int(asked)
    for name in _THREAD_VARIABLES:
        os.environ.setdefault(name, str(share))
    return share


def configure_logging(level: str, who: str, log_format: str = "text") -> None:
    """Log to stderr, each line saying who wrote it; a crash in native code leaves its stacks there too."""
    if sys.stderr is not None:  # closed, as some daemons do
        faulthandler.enable()
    logging.basicConfig(level=level.upper(), force=True)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter(log_format, who))
