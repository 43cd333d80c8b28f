"""Several front-end processes on one port, and the engine behind them: starts, watches and ends them; no HTTP in here.

Each front end has a listening socket of its own, which stays open here, so that connections wait for one that is
started again. One that dies takes its own requests with it and is replaced; one that cannot even start, or dies again
and again, ends the server. A scheduler that is gone is replaced by the engine's keeper, and the front ends are told.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from configs.engine import EngineConfig
from configs.errors import EngineError, NanoEngineError, from_wire
from launch.front_dir import FrontDir
from launch.keys import ApiKeys
from launch.server.shared_numbers import OwnerNumbers
from nanoengine.engine_status import EngineCondition, EngineStatus
from nanoengine.llm_engine import GREETING_TIMEOUT
from nanoengine.processes import describe_exit, forget_child, register_child
from nanoengine.scheduler_keeper import SchedulerKeeper
from nanoengine.spawning import spawn_module

logger = logging.getLogger(__name__)

FRONT_MODULE = "launch.front_end_process"
# So many front ends may die within so many seconds before something must be wrong with all of them.
MAX_DEATHS, DEATHS_SECONDS = 5, 60.0
# What a front end needs after its drain: last words to its clients, and its own end.
_END_SECONDS = 3.0
_WATCH_SECONDS = 0.05


class FrontEndProcess:
    """One front end as a child: the pipes to and from it."""

    def __init__(
        self, config: EngineConfig, listener: socket.socket, keys: ApiKeys, run_dir: Path, front_dir: Path, number: int
    ) -> None:
        self.name = str(number)
        self._process: subprocess.Popen[bytes] | None = None
        self.is_ready = False
        self.failure: NanoEngineError | None = None
        self.hung: tuple[int, NanoEngineError] | None = None  # the incarnation that it takes for dead, and why
        status_read, self._status_fd = os.pipe()
        death_read, self._death_fd = os.pipe()
        self._report_fd, report_write = os.pipe()
        os.set_blocking(self._report_fd, False)
        self._report = b""
        message = {
            "name": f"front end {number}",
            "front_name": self.name,
            "front_dir": str(front_dir),
            "config": config.to_dict(),
            "key_digests": [digest.hex() for digest in keys.digests],
            "run_dir": str(run_dir),
            "owner_pid": os.getpid(),
            "listener_fd": listener.fileno(),
            "status_fd": status_read,
            "death_fd": death_read,
            "report_fd": report_write,
        }
        theirs = [status_read, death_read, report_write]
        try:
            spawn_module(FRONT_MODULE, message, [*theirs, listener.fileno()], self._keep)
        finally:
            for fd in theirs:
                os.close(fd)

    def _keep(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        # Its end of this pipe is closed by its death and by nothing else.
        register_child(process.pid, self._report_fd)

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def tell(self, condition: EngineCondition) -> None:
        """Pass on what became of the engine."""
        with contextlib.suppress(OSError):  # it is gone, which `exit_code` says
            os.write(self._status_fd, json.dumps(condition.to_dict()).encode() + b"\n")

    def read(self) -> None:
        """Take in what it says: that it serves, why it ends, or that the scheduler hangs."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._report_fd, 65536):
                *lines, self._report = (self._report + chunk).split(b"\n")
                for report in map(json.loads, lines):
                    self.is_ready = self.is_ready or bool(report.get("ready"))
                    if "replace" in report:
                        self.hung = (report["replace"], from_wire(report["error"]))
                    elif "error" in report:
                        self.failure = from_wire(report["error"])

    def wait(self, timeout: float) -> None:
        """Block until it says something or ends, for at most `timeout` seconds; then `read`."""
        select.select([self._report_fd], [], [], timeout)

    def ask_to_stop(self) -> None:
        """Pass a stop on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def end(self) -> None:
        """Kill it if it still runs, reap it, and close the pipes. Harmless twice."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        forget_child(self.pid)
        for fd in (self._status_fd, self._death_fd, self._report_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._status_fd = self._death_fd = self._report_fd = -1


class FrontGroup:
    """The front ends of one server, one for each listener; used once, on one event loop.

    Args:
        stop: becomes done when the server shall stop.
        on_ready: called once all of them serve.
    """

    def __init__(
        self,
        config: EngineConfig,
        listeners: list[socket.socket],
        keys: ApiKeys,
        stop: asyncio.Future[None],
        on_ready: Callable[[], None],
    ) -> None:
        self._config, self._listeners, self._keys = config, listeners, keys
        self._stop, self._on_ready = stop, on_ready
        self._engine: EngineStatus = SchedulerKeeper(config)
        self._told: EngineCondition | None = None  # what the front ends know of it
        self._fronts: list[FrontEndProcess] = []
        self._num_started = 0
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)
        self._numbers = OwnerNumbers(config.max_model_len)

    async def run(self) -> NanoEngineError | None:
        """Load and serve until the stop; returns why the server failed, None after a stop that was asked for.

        Raises whatever keeps the engine from starting.
        """
        try:
            self._engine.start()
            self._fronts = [self._start_front(listener) for listener in self._listeners]
            await self._load()
            failure = await self._watch()
            return await self._end_fronts(failure)
        except NanoEngineError as error:
            await self._end_fronts(error)
            raise
        finally:
            for front in self._fronts:
                front.end()
            await asyncio.to_thread(self._engine.stop)

    def _start_front(self, listener: socket.socket) -> FrontEndProcess:
        config = front_config(self._config, self._num_started)
        self._num_started += 1
        front = FrontEndProcess(config, listener, self._keys, self._engine.run_dir, self._front_dir, self._num_started)
        logger.info("front end %d has pid %d", self._num_started, front.pid)
        return front

    @property
    def _front_dir(self) -> Path:
        return self._engine.run_dir / "fronts"

    async def _load(self) -> None:
        """Wait for engine and front ends; returns early when a stop is asked for."""
        timeout = self._config.parallel.start_timeout + GREETING_TIMEOUT
        loading = asyncio.create_task(asyncio.to_thread(self._engine.wait_ready, timeout))
        while not (self._stop.done() or loading.done()):
            self._check_fronts()
            await asyncio.wait([loading, self._stop], timeout=_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            loading.add_done_callback(_retrieve)
            return
        loading.result()
        self._tell_all()
        while not (self._stop.done() or all(front.is_ready for front in self._fronts)):
            self._check_fronts()
            await asyncio.wait([self._stop], timeout=_WATCH_SECONDS)
        if not self._stop.done():
            self._on_ready()

    def _check_fronts(self) -> None:
        """Raises why a front end did not start."""
        for front in self._fronts:
            front.read()
            if front.exit_code is not None:
                raise front.failure or EngineError(
                    f"a front end (pid {front.pid}) did not start: {describe_exit(front.exit_code)}"
                )

    async def _watch(self) -> NanoEngineError | None:
        """Wait for the stop (None) or for a failure; meanwhile front ends that die are replaced."""
        while not self._stop.done():
            failure = self._tell_all()
            if failure is not None and self._config.server.exit_on_failure:
                return failure
            for number, front in enumerate(self._fronts):
                self._listen(front)
                if front.exit_code is None:
                    continue
                if (failure := self._note_death(front)) is not None:
                    return failure
                front.end()
                shared = FrontDir(self._front_dir, front.name)
                shared.clear()
                self._fronts[number] = self._start_front(self._listeners[number])
                if self._told is not None:
                    self._fronts[number].tell(self._told)
                self._numbers.note_restart(shared.metrics, front.pid)
            await asyncio.wait([self._stop], timeout=_WATCH_SECONDS)
        return None

    def _note_death(self, front: FrontEndProcess) -> NanoEngineError | None:
        """The failure that it is, if too many died lately."""
        how = f"front end (pid {front.pid}) ended: {describe_exit(front.exit_code)}"
        now = time.monotonic()
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS and now - self._deaths[0] < DEATHS_SECONDS:
            return front.failure or EngineError(f"{MAX_DEATHS} front ends died within {DEATHS_SECONDS:g} s; a {how}")
        logger.error("a %s; it is started again", how)
        return None

    async def _end_fronts(self, failure: NanoEngineError | None) -> NanoEngineError | None:
        """Let them drain, or tell them why there is nothing to wait for; then they are given a moment to end.

        Returns the failure, which may come while they drain.
        """
        deadline = time.monotonic() + _END_SECONDS
        if failure is None:
            deadline += self._config.server.shutdown_timeout
            for listener in self._listeners:
                listener.close()  # the last copy is the front end's, which answers 503 until it closes it
        else:
            self._tell_all(failure)
        for front in self._fronts:
            front.ask_to_stop()
        while any(front.exit_code is None for front in self._fronts) and time.monotonic() < deadline:
            failure = self._tell_all(failure)
            for front in self._fronts:
                self._listen(front)
            await asyncio.sleep(_WATCH_SECONDS)
        return failure

    def _listen(self, front: FrontEndProcess) -> None:
        """Take in what it says, and have a scheduler replaced that it takes for dead."""
        front.read()
        if front.hung is not None:
            self._engine.replace(*front.hung)
            front.hung = None

    def _tell_all(self, failure: NanoEngineError | None = None) -> NanoEngineError | None:
        """Have the front ends know what became of the engine, or the server's own failure; returns why it ends."""
        if self._told is not None and self._told.is_final:
            return self._told.cause
        condition = self._engine.look() if failure is None else EngineCondition(cause=failure, is_final=True)
        if condition is not self._told:
            self._told = condition
            for front in self._fronts:
                front.tell(condition)
        return condition.cause if condition.is_final else None


def front_config(config: EngineConfig, number: int) -> EngineConfig:
    """The settings of the front end that was started as `number`, from 0.

    Each gets its share of what may be queued. Seeds that are drawn for requests without one must not be the same in
    all of them; those of the first are those of a single front end.
    """
    server, count = config.server, config.server.api_server_count
    share = dataclasses.replace(
        server,
        max_queued_requests=-(-server.max_queued_requests // count),
        max_queued_tokens=None if server.max_queued_tokens is None else -(-server.max_queued_tokens // count),
    )
    seed = config.model.seed
    if number:
        seed = int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8]) >> 1
    return dataclasses.replace(config, server=share, model=dataclasses.replace(config.model, seed=seed))


def _retrieve(task: asyncio.Task[None]) -> None:
    """Look at the end of a start that nobody waits for: asyncio complains about errors that nobody has seen."""
    if not task.cancelled():
        task.exception()
