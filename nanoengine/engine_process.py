"""Starts, watches and ends the scheduler process: the owner's side.

It knows neither requests nor ranks: what the scheduler does is in `nanoengine.engine`, and how it receives what
is prepared here in `nanoengine.bootstrap`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from configs.engine import EngineConfig
from configs.errors import ConfigError, EngineDeadError, NanoEngineError
from nanoengine.bootstrap import Bootstrap, receive_bootstrap
from nanoengine.engine_status import EngineStatus
from nanoengine.processes import describe_exit
from nanoengine.run_dir import RunDir
from nanoengine.spawning import spawn_module

__all__ = ["Bootstrap", "EngineProcess", "receive_bootstrap"]

ENGINE_MODULE = "nanoengine.engine"
_EXIT_CODE_SECONDS = 1.0
_WATCHDOG_SECONDS = 0.5


class EngineProcess(EngineStatus):
    """One scheduler process with its private run directory. Usable once; a restart is a new object.

    `stop` may be called from any thread, also while another one is in `wait_ready`; the rest is for one thread.
    """

    def __init__(self, config: EngineConfig, incarnation: int = 1, module: str = ENGINE_MODULE) -> None:
        """`config` is resolved; `incarnation` is higher than that of any scheduler before."""
        super().__init__()
        self._config, self._incarnation, self._module = config, incarnation, module
        self._stop_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._run_dir: RunDir | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._death_fd = -1

    @property
    def run_dir(self) -> Path:
        """The engine's private directory; known after `start`."""
        assert self._run_dir is not None, "start() comes first"
        return self._run_dir.path

    @property
    def pid(self) -> int:
        """The scheduler's process id; known after `start`."""
        assert self._process is not None, "start() comes first"
        return self._process.pid

    def start(self) -> None:
        """Make the run directory (after sweeping stale ones) and spawn the scheduler; does not wait for it.

        Raises:
            ConfigError: no run directory can be made, or there is no Python interpreter to start.
        """
        assert self._run_dir is None, "an EngineProcess starts once"
        if not sys.executable:
            raise ConfigError("sys.executable is empty: no Python interpreter is known to start the engine with")
        self._run_dir = RunDir.create()
        atexit.register(self.stop)
        try:
            self._spawn(self._run_dir)
        except BaseException:
            self.stop()
            raise

    def _spawn(self, run_dir: RunDir) -> None:
        death_read, self._death_fd = os.pipe()
        self._status_fd, status_write = os.pipe()
        os.set_blocking(self._status_fd, False)
        message = {
            # Clients show their keys to the HTTP front end; nothing behind that needs them.
            "config": dataclasses.replace(
                self._config, server=dataclasses.replace(self._config.server, api_key=())
            ).to_dict(),
            "run_dir": str(run_dir.path),
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

    def _describe_end(self) -> NanoEngineError:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_CODE_SECONDS)
        how = describe_exit(self._process.returncode)
        return EngineDeadError(f"{self._who} ended: {how}")

    def stop(self, timeout: float = 3.0) -> None:
        """End the process within `timeout` seconds (SIGTERM, then harder) and remove the run directory.

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
                if self._run_dir is not None:
                    self._run_dir.remove()
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
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, timeout - _WATCHDOG_SECONDS))
        if process.poll() is None:
            # Its main thread is stuck. The watchdog at the other end of the pipe kills the ranks and exits.
            os.close(self._death_fd)
            self._death_fd = -1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_WATCHDOG_SECONDS)
