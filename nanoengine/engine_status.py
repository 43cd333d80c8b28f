"""What is known of a scheduler process from its reports: that it is ready, or why it ended; starts and ends nothing.

The reports are lines of JSON in a pipe: `{"ready": true}`, or `{"error": …}` as `configs.errors.to_wire` renders it.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import select
import threading
import time
from pathlib import Path

from configs.errors import DeadlineError, EngineDeadError, NanoEngineError, from_wire


class EngineStatus(abc.ABC):
    """A scheduler as its front ends see it: where it is, and how it is."""

    def __init__(self) -> None:
        self._status_lock = threading.Lock()  # nobody reads the descriptor while it is closed, or just after
        self._status_fd = -1
        self._status = b""  # what has been read of the line to come
        self._ready = False
        self._stopped = False
        self._failure: NanoEngineError | None = None

    @property
    @abc.abstractmethod
    def run_dir(self) -> Path:
        """The engine's private directory; known after `start`."""

    @property
    def address(self) -> str:
        """`ipc://` address of the scheduler's ROUTER for front ends; known after `start`."""
        return f"ipc://{self.run_dir}/front"

    @abc.abstractmethod
    def start(self) -> None:
        """Begin; does not wait for the engine."""

    @abc.abstractmethod
    def stop(self, timeout: float = 3.0) -> None:
        """Give back what `start` took. Harmless twice, and from any thread."""

    @abc.abstractmethod
    def _describe_end(self) -> NanoEngineError:
        """Why the pipe ended without a report of a failure."""

    @property
    def _who(self) -> str:
        return "the scheduler process"

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
                    raise DeadlineError(f"{self._who} is not ready after {timeout:g} s")
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
        failure = self._describe_end()
        if self._failure is None and not self._stopped:
            self._failure = failure
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

    def _close_status(self) -> None:
        with self._status_lock:
            if self._status_fd >= 0:
                os.close(self._status_fd)
            self._status_fd = -1


class AttachedEngine(EngineStatus):
    """A scheduler that another process owns, which passes its reports on; for one of several front ends.

    Args:
        status_fd: the reports' pipe, which ends with the owner; closed by `stop`.
    """

    def __init__(self, run_dir: Path, status_fd: int) -> None:
        super().__init__()
        self._run_dir, self._status_fd = run_dir, status_fd
        os.set_blocking(status_fd, False)

    @property
    def run_dir(self) -> Path:
        return self._run_dir

    def start(self) -> None:
        """Nothing to do: the owner has started it."""

    def stop(self, timeout: float = 3.0) -> None:
        """Look no longer; the engine goes on."""
        self._stopped = True
        self._close_status()

    def _describe_end(self) -> NanoEngineError:
        return EngineDeadError("the process that owns the engine is gone")
