"""What is known of an engine: which of its schedulers serves, or why none does; starts and ends nothing.

Reports come through a pipe, one line of JSON each. A scheduler tells its owner `{"ready": true}`, `{"progress": true}`
once it has brought a token, and `{"error": …, "is_final": …}` (see `configs.errors.to_wire`). The owner of several
front ends tells them an `EngineCondition`.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import json
import os
import select
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import DeadlineError, EngineDeadError, NanoEngineError, from_wire, to_wire


@dataclasses.dataclass
class SchedulerRestartStats:
    """Counts of one engine's life.

    Attributes:
        restarts: schedulers started in place of one that was gone, by `reason`: died (without a word), raised, silent,
            stopped (by a signal), start (it did not come up).
        seconds: from each end of a scheduler until the next one was ready, added up, and the last of them.
        requests_resumed: open requests that were handed to the next scheduler, once for each. A front end counts its
            own; the rest is the same in all of them.
    """

    restarts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: float = 0.0
    last_seconds: float = 0.0
    requests_resumed: int = 0

    def copy(self) -> SchedulerRestartStats:
        """As it is now."""
        return dataclasses.replace(self, restarts=self.restarts.copy())


@dataclasses.dataclass(frozen=True)
class EngineCondition:
    """How an engine is at one moment.

    Attributes:
        incarnation: numbers the scheduler that serves, or the last one that did; 0 while the first one loads.
        address: of its ROUTER for front ends.
        cause: why none serves; None while one does.
        is_final: none will serve any more.
        restarts: what was counted so far.
    """

    incarnation: int = 0
    address: str = ""
    cause: NanoEngineError | None = None
    is_final: bool = False
    restarts: SchedulerRestartStats = dataclasses.field(default_factory=SchedulerRestartStats)

    @property
    def serves(self) -> bool:
        """Whether there is a scheduler that takes requests."""
        return self.incarnation > 0 and self.cause is None

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "incarnation": self.incarnation,
            "address": self.address,
            "cause": None if self.cause is None else to_wire(self.cause),
            "is_final": self.is_final,
            "restarts": vars(self.restarts),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EngineCondition:
        """What `to_dict` rendered."""
        restarts = SchedulerRestartStats(**data["restarts"])
        restarts.restarts = collections.Counter(restarts.restarts)
        cause = None if data["cause"] is None else from_wire(data["cause"])
        return cls(data["incarnation"], data["address"], cause, data["is_final"], restarts)


class EngineStatus(abc.ABC):
    """An engine as its front ends see it, whoever owns it and however many schedulers it had."""

    @property
    @abc.abstractmethod
    def run_dir(self) -> Path:
        """The engine's private directory, which outlives its schedulers; known after `start`."""

    @abc.abstractmethod
    def start(self) -> None:
        """Begin; does not wait for the engine."""

    @abc.abstractmethod
    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once a scheduler serves. Ctrl-C in here also stops it.

        Raises:
            NanoEngineError: what the scheduler reported, typed as there (ConfigError, CheckpointError ...).
            EngineDeadError: it died without a word (gives the exit code or signal), or `stop` was called.
            DeadlineError: not ready within `timeout` seconds (None: as long as the process lives).
        """

    @abc.abstractmethod
    def look(self) -> EngineCondition:
        """How it is now. Never blocks for long."""

    @abc.abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable once something happened; then `look`. It is the same all the time.

        It may be readable for no reason, and may stay so once the engine has ended.
        """

    @abc.abstractmethod
    def replace(self, incarnation: int, error: NanoEngineError) -> None:
        """Take this scheduler for dead, although its process lives, because of `error`. Harmless twice, and late."""

    @abc.abstractmethod
    def stop(self, timeout: float = 3.0) -> None:
        """Give back what `start` took. Harmless twice, and from any thread."""


class ReportedStatus(EngineStatus):
    """One that is known from the reports in a pipe."""

    def __init__(self) -> None:
        self._status_lock = threading.Lock()  # nobody reads the descriptor while it is closed, or just after
        self._status_fd = -1
        self._status = b""  # what has been read of the line to come
        self._ready = False
        self._stopped = False
        self._failure: NanoEngineError | None = None

    @abc.abstractmethod
    def _take(self, report: dict[str, Any]) -> None:
        """Take in a report: may set `_ready` and `_failure`."""

    @abc.abstractmethod
    def _describe_end(self) -> NanoEngineError:
        """Why the pipe ended without a report of a failure."""

    @property
    def _who(self) -> str:
        return "the scheduler process"

    def wait_ready(self, timeout: float | None = None) -> None:
        """See `EngineStatus.wait_ready`."""
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
                    self.wait(left)
        except (KeyboardInterrupt, SystemExit):
            self.stop()
            raise

    def wait(self, timeout: float | None) -> None:
        """Block until the pipe says something or ends, for a second at most: `stop` in another thread ends it too."""
        poller = select.poll()
        with contextlib.suppress(ValueError, OSError):
            poller.register(self._status_fd, select.POLLIN)
            poller.poll(1000 if timeout is None else min(1000, max(0, round(timeout * 1000))))

    def failure(self) -> NanoEngineError | None:
        """None while there is hope, else why it ended. Never blocks for long."""
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
        """Take in what was reported; False once the pipe has ended."""
        try:
            while chunk := os.read(self._status_fd, 65536):
                *lines, self._status = (self._status + chunk).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
            return False
        except BlockingIOError:
            return True
        except OSError:  # stopped meanwhile, in another thread
            return False

    def fileno(self) -> int:
        """See `EngineStatus.fileno`."""
        return self._status_fd

    def _close_status(self) -> None:
        with self._status_lock:
            if self._status_fd >= 0:
                os.close(self._status_fd)
            self._status_fd = -1


class AttachedEngine(ReportedStatus):
    """An engine that another process owns, which tells of its condition; for one of several front ends.

    Args:
        status_fd: the pipe, which ends with the owner; closed by `stop`.
        ask: passes a message on to the owner.
    """

    def __init__(self, run_dir: Path, status_fd: int, ask: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._run_dir, self._status_fd, self._ask = run_dir, status_fd, ask
        self._condition = EngineCondition()
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

    def look(self) -> EngineCondition:
        """See `EngineStatus.look`."""
        failure = self.failure()
        if failure is not None and not self._condition.is_final:
            self._condition = dataclasses.replace(self._condition, cause=failure, is_final=True)
        return self._condition

    def replace(self, incarnation: int, error: NanoEngineError) -> None:
        """Ask the owner to do it."""
        self._ask({"replace": incarnation, "error": to_wire(error)})

    def _take(self, report: dict[str, Any]) -> None:
        self._condition = EngineCondition.from_dict(report)
        self._ready = self._condition.serves
        if self._condition.is_final:
            self._failure = self._failure or self._condition.cause

    def _describe_end(self) -> NanoEngineError:
        return EngineDeadError("the process that owns the engine is gone")
