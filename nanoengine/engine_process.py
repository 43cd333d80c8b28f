"""Starts, watches and ends one scheduler process: the owner's side.

It knows neither requests nor ranks: what the scheduler does is in `nanoengine.engine`, and how it receives what
is prepared here in `nanoengine.bootstrap`. What follows when it is gone is decided in `nanoengine.scheduler_keeper`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import ConfigError, EngineDeadError, NanoEngineError, from_wire
from nanoengine.bootstrap import Bootstrap, receive_bootstrap
from nanoengine.engine_status import EngineCondition, ReportedStatus
from nanoengine.processes import STACK_SIGNAL, describe_exit, is_stopped
from nanoengine.run_dir import RunDir
from nanoengine.spawning import spawn_module

__all__ = ["Bootstrap", "EngineProcess", "receive_bootstrap"]

ENGINE_MODULE = "nanoengine.engine"
_EXIT_CODE_SECONDS = 1.0
_WATCHDOG_SECONDS = 0.5
_STACK_SECONDS = 0.3


class EngineProcess(ReportedStatus):
    """One scheduler process with its private directory. Usable once; a restart is a new object.

    `stop` may be called from any thread, also while another one is in `wait_ready`; the rest is for one thread.

    Attributes:
        has_progressed: it has brought a token.
        is_hopeless: it ended because another one would fare no better.
        reason: a word for statistics, once it has failed; see `SchedulerRestartStats`.
    """

    def __init__(
        self,
        config: EngineConfig,
        incarnation: int = 1,
        module: str = ENGINE_MODULE,
        run_dir: RunDir | None = None,
    ) -> None:
        """`config` is resolved; `incarnation` is higher than that of any scheduler before.

        `run_dir` is the engine's, which stays when this scheduler ends; by default it is made, and goes with it.
        """
        super().__init__()
        self._config, self._incarnation, self._module = config, incarnation, module
        self._stop_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._run_dir, self._owns_run_dir = run_dir, run_dir is None
        self._part: Path | None = None  # of the run directory: this scheduler's
        self._process: subprocess.Popen[bytes] | None = None
        self._death_fd = -1
        self.has_progressed = self.is_hopeless = False
        self.reason = "died"

    @property
    def run_dir(self) -> Path:
        """The engine's private directory; known after `start`."""
        assert self._run_dir is not None, "start() comes first"
        return self._run_dir.path

    @property
    def address(self) -> str:
        """`ipc://` address of the scheduler's ROUTER for front ends; known after `start`."""
        assert self._part is not None, "start() comes first"
        return f"ipc://{self._part}/front"

    @property
    def pid(self) -> int:
        """The scheduler's process id; known after `start`."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    @property
    def was_stopped(self) -> bool:
        """Whether somebody called `stop`."""
        return self._stopped

    @property
    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, a debugger) keeps the process from running."""
        return self._process is not None and is_stopped(self._process.pid)

    def look(self) -> EngineCondition:
        """See `EngineStatus.look`: nobody takes this scheduler's place."""
        failure = self.failure()
        return EngineCondition(self._incarnation if self._ready else 0, self.address, failure, failure is not None)

    def start(self) -> None:
        """Make the run directory (after sweeping stale ones) and spawn the scheduler; does not wait for it.

        Raises:
            ConfigError: no run directory can be made, or there is no Python interpreter to start.
            OSError: there are no more processes or descriptors to be had.
        """
        assert self._part is None, "an EngineProcess starts once"
        if not sys.executable:
            raise ConfigError("sys.executable is empty: no Python interpreter is known to start the engine with")
        self._run_dir = self._run_dir or RunDir.create()
        atexit.register(self.stop)
        try:
            self._spawn(self._run_dir)
        except BaseException:
            self.stop()
            raise

    def _spawn(self, run_dir: RunDir) -> None:
        self._part = run_dir.make_part(self._incarnation)
        death_read, self._death_fd = os.pipe()
        self._status_fd, status_write = os.pipe()
        os.set_blocking(self._status_fd, False)
        message = {
            # Clients show their keys to the HTTP front end; nothing behind that needs them.
            "config": dataclasses.replace(
                self._config, server=dataclasses.replace(self._config.server, api_key=())
            ).to_dict(),
            "engine_dir": str(run_dir.path),
            "run_dir": str(self._part),
            "front_address": self.address,
            "incarnation": self._incarnation,
            "owner_pid": self._owner_pid,
            "death_fd": death_read,
            "status_fd": status_write,
            "lock_fd": run_dir.lock_fd,
        }

        def keep(process: subprocess.Popen[bytes]) -> None:
            self._process = process

        try:
            spawn_module(self._module, message, [death_read, status_write, run_dir.lock_fd], keep)
        finally:
            os.close(death_read)
            os.close(status_write)

    @property
    def _who(self) -> str:
        return f"the scheduler process (pid {self.pid})"

    def _take(self, report: dict[str, Any]) -> None:
        if report.get("ready"):
            self._ready = True
        elif report.get("progress"):
            self.has_progressed = True
        elif self._failure is None:
            self._failure, self.is_hopeless, self.reason = from_wire(report["error"]), report["is_final"], "raised"

    def _describe_end(self) -> NanoEngineError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_CODE_SECONDS)
        how = describe_exit(self._process.returncode)
        return EngineDeadError(f"{self._who} ended: {how}")

    def replace(self, incarnation: int, error: NanoEngineError) -> None:
        """See `EngineStatus.replace`: this one is killed, and nobody takes its place."""
        if incarnation == self._incarnation:
            self.kill(error)

    def kill(self, error: NanoEngineError) -> None:
        """End the process at once, with its ranks, because of `error`. Harmless when it has ended.

        Where its threads stand goes to the log, if it can still say so.
        """
        process = self._process
        if self._failure is not None or self._stopped or process is None:
            return
        self._failure = error
        if process.poll() is None:
            process.send_signal(STACK_SIGNAL)
            process.send_signal(signal.SIGCONT)
            time.sleep(_STACK_SECONDS)
            process.kill()  # and the kernel its ranks

    def stop(self, timeout: float = 3.0) -> None:
        """End the process within `timeout` seconds (SIGTERM, then harder) and remove its directory.

        Harmless twice, from `atexit`, while the scheduler is still loading, and in a forked child (which owns
        nothing). The scheduler's ranks end before it does, or are killed by the kernel when it is killed.
        """
        if os.getpid() != self._owner_pid:
            return
        with self._stop_lock:
            if self._stopped:
                return
            self._stopped = True
            try:
                self._end_process(timeout)
            finally:
                self._close_status()
                if self._death_fd >= 0:
                    os.close(self._death_fd)
                self._death_fd = -1
                if self._owns_run_dir and self._run_dir is not None:
                    self._run_dir.remove()
                elif self._part is not None:
                    shutil.rmtree(self._part, ignore_errors=True)
                atexit.unregister(self.stop)

    def _end_process(self, timeout: float) -> None:
        process = self._process
        if process is None:
            return
        try:
            self._ask_to_end(process, timeout)
        finally:  # also on a second Ctrl-C
            if process.poll() is None:
                process.kill()
            process.wait()

    def _ask_to_end(self, process: subprocess.Popen[bytes], timeout: float) -> None:
        if process.poll() is None:
            with contextlib.suppress(OSError):  # it ended just now
                os.write(self._death_fd, b"x")  # so that it is not taken for our death
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, timeout - _WATCHDOG_SECONDS))
        if process.poll() is None:
            # Its main thread is stuck. The watchdog at the other end of the pipe kills the ranks and exits.
            os.close(self._death_fd)
            self._death_fd = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_WATCHDOG_SECONDS)
