"""Runs the ranks inside the calling process: one in the calling thread, several as threads. For tests and debugging.

It knows the code that computes only as a string, `module:function`, imported on start.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias, TypeVar

from configs.engine import EngineConfig
from configs.errors import DeadlineError, EngineError, NanoEngineError, StepError, WorkerError
from nanoengine.channel import BlockCounts
from nanoengine.executor import MAX_IN_FLIGHT, Executor, ExecutorFacts
from nanoengine.rank_process import resolve
from nanoengine.step import Epoch, GaveUp, StepInput, StepOutput

RANKS_ENTRY = "workers.worker:create_ranks"

T = TypeVar("T")
Outcome: TypeAlias = "StepOutput | GaveUp | None"

_CAUSE_SECONDS = 1.0


class Rank(Protocol):
    """What an in-process rank can do; `workers.worker.Worker` is one."""

    dtype_name: str
    device_name: str

    def load(self) -> BlockCounts:
        """Load the model; returns how many K/V blocks would fit."""

    def allocate(self, num_blocks: BlockCounts) -> None:
        """Make the K/V cache and warm up."""

    def execute(self, step: StepInput) -> Outcome:
        """Compute a step; rank 0 returns its output, and any rank GaveUp instead when it found no memory."""

    def forget(self) -> None:
        """Every step so far is void."""

    def close(self) -> None:
        """Leave the group, together with the other ranks."""

    def abort(self) -> None:
        """Leave without waiting; whoever waits for this rank raises instead. From any thread."""


class InProcessExecutor(Executor):
    """At tp 1 `submit` queues and `collect` computes, in the caller's thread. At tp > 1 each rank is a thread."""

    def __init__(self, config: EngineConfig, entry: str = RANKS_ENTRY) -> None:
        """`entry` names a function that is given the config and returns the list of ranks."""
        self._config, self._entry = config, entry
        self._ranks: list[Rank] = []
        self._threads: list[ThreadPoolExecutor] = []
        self._queue: collections.deque[tuple[StepInput, list[Future[Outcome]]]] = collections.deque()
        self._failure: NanoEngineError | None = None
        self._wake: tuple[int, int] | None = None  # a pipe holding a byte for each step that can be collected

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not yet collected."""
        return len(self._queue)

    def start(self, epoch: Epoch) -> ExecutorFacts:
        """See `Executor.start`; there is no process whose death could be noticed."""
        assert not self._ranks, "stop() comes before another start()"
        self._failure = None
        self._wake = os.pipe()
        try:
            ranks: list[Rank] = resolve(self._entry)(self._config)
            self._ranks = ranks
            if len(ranks) > 1:
                self._threads = [ThreadPoolExecutor(1, f"rank {number}") for number in range(len(ranks))]
            timeout = self._config.parallel.start_timeout
            loading = [self._call(number, rank.load) for number, rank in enumerate(ranks)]
            num_blocks = BlockCounts.least(self._results(loading, timeout))
            warming: list[Future[None]] = [
                self._call(number, rank.allocate, num_blocks) for number, rank in enumerate(ranks)
            ]
            self._results(warming, timeout)
        except BaseException:
            self._release(together=False)
            raise
        return ExecutorFacts(num_blocks.device, ranks[0].dtype_name, ranks[0].device_name, num_blocks.host)

    def submit(self, step: StepInput) -> None:
        """See `Executor.submit`."""
        self._raise_failure()
        assert len(self._queue) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
        futures: list[Future[Outcome]] = []
        if self._threads:
            futures = [self._call(number, rank.execute, step) for number, rank in enumerate(self._ranks)]
            futures[0].add_done_callback(lambda _: self._ring())
        else:
            self._ring()
        self._queue.append((step, futures))

    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """See `Executor.collect`; at tp 1 it computes whatever `timeout` says."""
        self._raise_failure()
        if not self._queue:
            return None
        step, futures = self._queue[0]
        if not futures:
            futures = [self._call(0, self._ranks[0].execute, step)]
        patience = self._config.parallel.step_timeout if timeout is None else timeout
        if timeout is not None and not concurrent.futures.wait(futures[:1], patience).done:
            return None
        try:
            outcomes = self._results(futures, self._config.parallel.step_timeout)
        except NanoEngineError as error:
            self._failure = error if isinstance(error, WorkerError) else WorkerError(error.message)
            self._queue.clear()
            raise self._failure from error
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, GaveUp):
                message = f"rank {rank} found no memory for step {outcome.step_id} ({outcome.reason})"
                raise StepError(message, rank, outcome.step_id)
        assert isinstance(outcomes[0], StepOutput), "rank 0 has no output"
        self._leave_queue()
        return outcomes[0]

    def forget_steps(self) -> None:
        """See `Executor.forget_steps`. Ranks that are threads leave the steps that they are in first."""
        self._raise_failure()
        try:
            while self._queue:
                self._results(self._queue[0][1], self._config.parallel.step_timeout)
                self._leave_queue()
            self._results([self._call(number, rank.forget) for number, rank in enumerate(self._ranks)], _CAUSE_SECONDS)
        except NanoEngineError as error:
            self._failure = error if isinstance(error, WorkerError) else WorkerError(error.message)
            raise self._failure from error

    def _leave_queue(self) -> None:
        self._queue.popleft()
        if self._wake is not None:
            os.read(self._wake[0], 1)

    def watch(self) -> None:
        """See `Executor.watch`."""
        self._raise_failure()

    def wait_fds(self) -> list[object]:
        """See `Executor.wait_fds`."""
        return [] if self._wake is None else [self._wake[0]]

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._release(together=self._failure is None)

    def _call(self, number: int, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Run one rank's method: in its thread, or at once."""
        if self._threads:
            return self._threads[number].submit(self._run, self._ranks[number], function, *arguments)
        future: Future[T] = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    @staticmethod
    def _run(rank: Rank, function: Callable[..., T], *arguments: object) -> T:
        try:
            return function(*arguments)
        except BaseException:
            rank.abort()  # the others may be waiting for this one
            raise

    def _results(self, futures: list[Future[T]], timeout: float) -> list[T]:
        """Every rank's result; the first exception, typed, when one raised; DeadlineError names who is late."""
        done, late = concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_EXCEPTION)
        if any(future.exception() is not None for future in done):
            done, _ = concurrent.futures.wait(futures, _CAUSE_SECONDS)  # the first may be but a consequence
            failed = [(number, future.exception()) for number, future in enumerate(futures) if future in done]
            raise _cause([(number, error) for number, error in failed if error is not None])
        if late:
            names = ", ".join(f"rank {number}" for number, future in enumerate(futures) if future in late)
            raise DeadlineError(f"waited {timeout:g} s for {names}")
        return [future.result() for future in futures]

    def _ring(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):  # stopped meanwhile
                os.write(self._wake[1], b"x")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._ranks:
            raise EngineError("the executor is not running")

    def _release(self, *, together: bool) -> None:
        """Close the ranks (only when all can: closing waits for the others) and what the group holds."""
        if together and self._ranks:
            closing = [self._call(number, rank.close) for number, rank in enumerate(self._ranks)]
            concurrent.futures.wait(closing, 5)
        elif self._threads:
            for rank in self._ranks:
                rank.abort()
        for thread in self._threads:
            thread.shutdown(wait=together, cancel_futures=True)
        for fd in self._wake or ():
            os.close(fd)
        self._ranks, self._threads, self._wake = [], [], None
        self._queue.clear()


def _cause(errors: list[tuple[int, BaseException]]) -> NanoEngineError:
    """What to raise for the ranks' errors: rather a cause than that somebody waited for it in vain."""
    number, error = min(errors, key=lambda each: (isinstance(each[1], DeadlineError | WorkerError), each[0]))
    if isinstance(error, NanoEngineError):
        return error
    failure = WorkerError(f"rank {number} failed: {type(error).__name__}: {error}", number)
    failure.__cause__ = error
    return failure
