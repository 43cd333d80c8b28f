"""Keeps an engine's scheduler running: starts it, and another one when it is gone; the owner's side.

It knows neither requests nor ranks. Whoever speaks to the scheduler sees by `look` which one serves, and hands it the
requests that are open (`EngineClient.attach`).

What keeps the first scheduler from starting is raised. A later one that dies, raises or hangs is replaced, unless it
said itself that this is hopeless, or `max_restarts` in a row brought no token.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import threading
import time
from pathlib import Path

from configs.engine import EngineConfig
from configs.errors import DeadlineError, EngineDeadError, EngineError, NanoEngineError
from nanoengine.circuit_breaker import CircuitBreaker, pause_before
from nanoengine.engine_process import ENGINE_MODULE, EngineProcess
from nanoengine.engine_status import EngineCondition, EngineStatus, SchedulerRestartStats
from nanoengine.run_dir import RunDir
from nanoengine.watched import start_thread

logger = logging.getLogger(__name__)

STOPPED_SECONDS = 10.0
"""A scheduler that a signal keeps from running for so long is replaced."""
# The scheduler itself gives up after start_timeout; this is for what comes before and after.
START_GRACE = 60.0
_WATCH_SECONDS = 1.0


class SchedulerKeeper(EngineStatus):
    """One engine: its scheduler process, and those that follow.

    `start`, `wait_ready` and `look` belong to one thread at a time; `stop` and `replace` to any. From the moment the
    first scheduler is ready a thread of its own watches it.
    """

    def __init__(self, config: EngineConfig, module: str = ENGINE_MODULE) -> None:
        """`config` is resolved."""
        self._config, self._module = config, module
        parallel = config.parallel
        self._breaker = CircuitBreaker(parallel.max_restarts, parallel.restart_window, time.monotonic)
        self._owner_pid = os.getpid()
        # A scheduler is not started while, or after, all is stopped; which the garbage collector may do in any thread.
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._run_dir: RunDir | None = None
        self._process: EngineProcess | None = None
        self._thread: threading.Thread | None = None
        self._wake_read = self._wake_write = -1
        self._condition = EngineCondition()
        self._stats = SchedulerRestartStats()
        self._to_replace: tuple[int, NanoEngineError] | None = None
        self._stopped_for = self._last_look = 0.0

    @property
    def run_dir(self) -> Path:
        """See `EngineStatus.run_dir`."""
        assert self._run_dir is not None, "start() comes first"
        return self._run_dir.path

    @property
    def pid(self) -> int:
        """The present scheduler's process id; known after `start`."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def start(self) -> None:
        """Make the run directory and spawn the first scheduler. Raises ConfigError; see `EngineProcess.start`."""
        assert self._run_dir is None, "a SchedulerKeeper starts once"
        self._run_dir = RunDir.create()
        atexit.register(self.stop)
        try:
            self._wake_read, self._wake_write = os.pipe()
            os.set_blocking(self._wake_read, False)
            os.set_blocking(self._wake_write, False)
            self._begin(1)
        except BaseException:
            self.stop()
            raise

    def wait_ready(self, timeout: float | None = None) -> None:
        """See `EngineStatus.wait_ready`."""
        assert self._process is not None, "start() comes first"
        self._process.wait_ready(timeout)
        with self._lock:
            if self._thread is None and not self._stopping.is_set():
                self._condition = EngineCondition(1, self._process.address)
                self._thread = start_thread(self._keep, "scheduler-keeper", self._break_down)

    def look(self) -> EngineCondition:
        """See `EngineStatus.look`."""
        with contextlib.suppress(OSError):
            os.read(self._wake_read, 4096)
        condition = self._condition
        if self._stopping.is_set() and not condition.is_final:
            return EngineCondition(condition.incarnation, "", EngineDeadError("the engine was stopped"), True)
        return condition

    def fileno(self) -> int:
        """See `EngineStatus.fileno`."""
        return self._wake_read

    def replace(self, incarnation: int, error: NanoEngineError) -> None:
        """See `EngineStatus.replace`; done by the thread that watches, within a second."""
        self._to_replace = (incarnation, error)

    def stop(self, timeout: float = 3.0) -> None:
        """End the scheduler within `timeout` seconds, whatever it does, and remove the run directory.

        Harmless twice, from any thread, from `atexit`, and in a forked child (which owns nothing).
        """
        if os.getpid() != self._owner_pid:
            return
        self._stopping.set()
        with self._lock:
            if self._process is not None:
                self._process.stop(timeout)
            if self._run_dir is not None:
                self._run_dir.remove()
            for fd in (self._wake_read, self._wake_write):
                if fd >= 0:
                    os.close(fd)
            self._wake_read = self._wake_write = -1
            atexit.unregister(self.stop)

    # -- the thread that watches --------------------------------------------------------------------------------

    def _keep(self) -> None:
        while (error := self._wait_for_end()) is not None:
            if not self._replace(error):
                return

    def _break_down(self, error: BaseException) -> None:
        """Nobody would see the scheduler's end: better it is the engine's."""
        cause = EngineError(f"nobody watches the scheduler any more: {type(error).__name__}: {error}")
        self._become(EngineCondition(self._condition.incarnation, "", cause, is_final=True))

    def _wait_for_end(self) -> NanoEngineError | None:
        """Why the present scheduler must be replaced, once it must be; None when all is stopped."""
        process = self._process
        assert process is not None
        while not self._stopping.is_set():
            error = process.failure()
            if error is not None:
                # It may have been stopped from elsewhere: the interpreter ends.
                return None if process.was_stopped else error
            asked, self._to_replace = self._to_replace, None
            if asked is not None and asked[0] == self._condition.incarnation:
                process.reason = "silent"
                return asked[1]
            self._check_stopped(process)
            process.wait(_WATCH_SECONDS)
        return None

    def _check_stopped(self, process: EngineProcess) -> None:
        """Kill a scheduler that a signal keeps from running for too long."""
        now = time.monotonic()
        # This process may have been stopped with it, by Ctrl-Z: no more than a look's time counts.
        seconds, self._last_look = min(now - self._last_look, 2 * _WATCH_SECONDS), now
        self._stopped_for = self._stopped_for + seconds if process.is_stopped else 0.0
        if self._stopped_for > STOPPED_SECONDS:
            self._stopped_for, process.reason = 0.0, "stopped"
            process.kill(DeadlineError(f"the scheduler process (pid {process.pid}) was stopped by a signal"))

    def _replace(self, error: NanoEngineError) -> bool:
        """End what is left of the scheduler and start another one; False when that is hopeless, or all is stopped."""
        process, began, num_failed_starts = self._process, time.monotonic(), 0
        assert process is not None
        incarnation, reason, is_futile = self._condition.incarnation, process.reason, not process.has_progressed
        while not self._stopping.is_set():
            logger.error("%s", error.message)
            is_final = process.is_hopeless and not num_failed_starts
            if not is_final and not self._breaker.allows(futile=is_futile):
                is_final, error = True, self._exhausted(error)
            self._become(EngineCondition(self._condition.incarnation, "", error, is_final))
            process.kill(error)
            process.stop()
            if is_final:
                return False
            self._stats.restarts[reason] += 1
            if self._stopping.wait(pause_before(num_failed_starts)):
                return False
            incarnation += 1
            logger.warning("starting another scheduler, incarnation %d", incarnation)
            try:
                process = self._begin(incarnation)
                self._await_ready(process)
            except OSError as cause:  # no more processes or descriptors, perhaps for a moment only
                error = EngineError(f"no scheduler can be started: {cause}")
            except NanoEngineError as cause:
                error = cause
            else:
                self._stats.last_seconds = time.monotonic() - began
                self._stats.seconds += self._stats.last_seconds
                logger.warning("a scheduler is ready again after %.1f s", self._stats.last_seconds)
                self._become(EngineCondition(incarnation, process.address))
                return True
            reason, is_futile, num_failed_starts = "start", True, num_failed_starts + 1
        return False

    def _begin(self, incarnation: int) -> EngineProcess:
        with self._lock:
            if not self._stopping.is_set():
                process = EngineProcess(self._config, incarnation, self._module, self._run_dir)
                process.start()
                self._process = process
                if not self._stopping.is_set():
                    return process
                process.stop()
        raise EngineDeadError("the engine was stopped")

    def _await_ready(self, process: EngineProcess) -> None:
        limit = self._config.parallel.start_timeout + START_GRACE
        deadline = time.monotonic() + limit
        while True:
            with contextlib.suppress(DeadlineError):
                process.wait_ready(_WATCH_SECONDS)
                return
            if (failure := process.failure()) is not None:
                raise failure
            if time.monotonic() > deadline:
                raise DeadlineError(f"the scheduler process (pid {process.pid}) is not ready after {limit:g} s")
            self._check_stopped(process)

    def _exhausted(self, error: NanoEngineError) -> NanoEngineError:
        """The last error, and that it was not the first."""
        parallel = self._config.parallel
        if parallel.max_restarts == 0:
            return error
        return EngineDeadError(
            f"{error.message}; {parallel.max_restarts} schedulers in its place within {parallel.restart_window:g} s "
            "brought no token"
        )

    def _become(self, condition: EngineCondition) -> None:
        self._condition = dataclasses.replace(condition, restarts=self._stats.copy())
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._wake_write >= 0:
                os.write(self._wake_write, b"x")
