"""Starts, watches and ends the scheduler process: the owner's side.

It knows neither requests nor ranks: what the scheduler does is in `nanoengine.engine`, and how it receives what
is prepared here in `nanoengine.bootstrap`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time

from configs.engine import EngineConfig
from configs.errors import ConfigError, DeadlineError, EngineDeadError, EngineError, NanoEngineError, from_wire
from nanoengine._packages import child_environment
from nanoengine.bootstrap import Bootstrap, receive_bootstrap
from nanoengine.processes import describe_exit, in_lasting_thread
from nanoengine.run_dir import RunDir

__all__ = ["Bootstrap", "EngineProcess", "receive_bootstrap"]

ENGINE_MODULE = "nanoengine.engine"
_EXIT_CODE_SECONDS = 1.0
_WATCHDOG_SECONDS = 0.5


class EngineProcess:
    """One scheduler process with its private run directory. Usable once; a restart is a new object.

    `stop` may be called from any thread, also while another one is in `wait_ready`; the rest is for one thread.
    """

    def __init__(self, config: EngineConfig, incarnation: int = 1, module: str = ENGINE_MODULE) -> None:
        """`config` is resolved; `incarnation` is higher than that of any scheduler before."""
        self._config, self._incarnation, self._module = config, incarnation, module
        self._stop_lock = threading.Lock()
        self._status_lock = threading.Lock()  # nobody reads the descriptor while it is closed, or just after
        self._owner_pid = os.getpid()
        self._run_dir: RunDir | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._status_fd = self._death_fd = -1
        self._status = b""  # what has been read of the line to come
        self._ready = False
        self._stopped = False
        self._failure: NanoEngineError | None = None

    @property
    def address(self) -> str:
        """`ipc://` address of the scheduler's ROUTER for front ends; known after `start`."""
        assert self._run_dir is not None, "start() comes first"
        return f"ipc://{self._run_dir.path}/front"

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
        bootstrap_read, bootstrap_write = os.pipe()
        death_read, self._death_fd = os.pipe()
        self._status_fd, status_write = os.pipe()
        os.set_blocking(self._status_fd, False)
        theirs = [bootstrap_read, death_read, status_write, run_dir.lock_fd]
        message = {
            # Clients show the key to the HTTP front end; nothing behind that needs it.
            "config": dataclasses.replace(
                self._config, server=dataclasses.replace(self._config.server, api_key=None)
            ).to_dict(),
            "run_dir": str(run_dir.path),
            "front_address": self.address,
            "incarnation": self._incarnation,
            "owner_pid": self._owner_pid,
            "death_fd": death_read,
            "status_fd": status_write,
            "lock_fd": run_dir.lock_fd,
        }
        try:
            # Written before there is a reader: it fits into the pipe, and nobody can be waited for in vain.
            os.set_blocking(bootstrap_write, False)
            with contextlib.closing(os.fdopen(bootstrap_write, "wb", buffering=0)) as pipe:
                data = json.dumps(message).encode()
                if pipe.write(data) != len(data):
                    raise EngineError(f"a configuration of {len(data)} bytes does not fit into a pipe")
            arguments = [sys.executable, "-m", self._module, f"--bootstrap-fd={bootstrap_read}"]

            def spawn() -> None:
                # Kept here, not returned: were the caller interrupted now, `stop` would still find the process.
                # It stays in our process group, so that Ctrl-Z stops and fg continues the engine with its owner.
                self._process = subprocess.Popen(
                    arguments, env=child_environment(), stdin=subprocess.DEVNULL, pass_fds=theirs
                )

            in_lasting_thread(spawn)
        finally:
            for fd in theirs[:-1]:
                os.close(fd)

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the scheduler reports ready. Ctrl-C in here also stops it.

        Raises:
            NanoEngineError: what the scheduler reported, typed as there (ConfigError, CheckpointError ...).
            EngineDeadError: it died without a word (gives the exit code or signal), or `stop` was called.
            DeadlineError: not ready within `timeout` seconds (None: as long as the process lives).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._ready:
                failure = self.failure()
                if failure is not None:
                    raise failure
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0 and not self._ready:
                    raise DeadlineError(f"the scheduler process (pid {self.pid}) is not ready after {timeout:g} s")
                if not self._ready:
                    self._wait_status(left)
        except (KeyboardInterrupt, SystemExit):
            self.stop()
            raise

    def _wait_status(self, timeout: float | None) -> None:
        """Block until the status pipe says something or ends, in slices: `stop` in another thread ends it too."""
        poller = select.poll()
        with contextlib.suppress(ValueError, OSError):
            poller.register(self._status_fd, select.POLLIN)
            poller.poll(1000 if timeout is None else min(1000, max(0, round(timeout * 1000))))

    def failure(self) -> NanoEngineError | None:
        """None while the process lives, else why it ended. Never blocks for long."""
        if self._failure is not None:
            return self._failure
        if self._stopped:
            return EngineDeadError("the engine was stopped")
        with self._status_lock:
            if self._read_status():
                return self._failure
        # The pipe has ended, so the process has, or is about to.
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_EXIT_CODE_SECONDS)
        if self._failure is None and not self._stopped:
            self._failure = EngineDeadError(
                f"the scheduler process (pid {self._process.pid}) ended: {describe_exit(self._process.returncode)}"
            )
        return self._failure

    def _read_status(self) -> bool:
        """Take in what the scheduler has reported; False once the pipe has ended."""
        try:
            while chunk := os.read(self._status_fd, 65536):
                *lines, self._status = (self._status + chunk).split(b"\n")
                for line in lines:
                    report = json.loads(line)
                    if report.get("ready"):
                        self._ready = True
                    elif self._failure is None:
                        self._failure = from_wire(report["error"])
            return False
        except BlockingIOError:
            return True
        except OSError:  # stopped meanwhile, in another thread
            return False

    def fileno(self) -> int:
        """A descriptor that is readable once something happened to the process; then ask `failure`.

        It also becomes readable when the scheduler reports ready, and stays so once the process has ended.
        """
        return self._status_fd

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
                with self._status_lock:
                    for fd in (self._death_fd, self._status_fd):
                        if fd >= 0:
                            os.close(fd)
                    self._death_fd = self._status_fd = -1
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
