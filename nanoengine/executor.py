"""Runs steps on a group of ranks: the interface the engine loop drives, and the choice of implementation.

It knows neither scheduling nor models; the ranks' code is named by a string and imported where it runs.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import logging
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

from configs.engine import EngineConfig
from configs.errors import ChannelError, DeadlineError, NanoEngineError, WorkerError
from nanoengine.channel import Allocate, BlockCounts
from nanoengine.step import Epoch, StepInput, StepOutput
from nanoengine.worker_group import WATCH_SECONDS, WorkerGroup

logger = logging.getLogger(__name__)

RANK_ENTRY = "workers.worker:run_worker"
MAX_IN_FLIGHT = 2
SILENCE_SECONDS = 10.0
"""A rank whose heartbeat is older than this counts as stopped (six times this while it loads)."""
FIRST_STEPS = 3
"""So many steps of an epoch may take as long as a start: a prefill, a decode and a mixed one may each compile."""


@dataclasses.dataclass(frozen=True)
class ExecutorFacts:
    """What was learnt while the ranks started; numbers of blocks are the minimum over ranks."""

    num_kv_blocks: int
    dtype: str
    device: str
    num_host_blocks: int = 0


class Executor(abc.ABC):
    """One group of ranks at a time. All methods belong to one thread; `stop` is harmless twice and in any phase.

    A failure of any rank is the failure of the group: the ranks are killed and reaped before the error is
    raised, and every later `submit`, `collect` and `watch` raises it again. `start` with a higher epoch begins
    a new group afterwards.
    """

    @property
    @abc.abstractmethod
    def num_in_flight(self) -> int:
        """Steps submitted and not yet collected."""

    @property
    def frames_rejected(self) -> int:
        """Frames on the channel to the ranks that were refused by either side, over all groups."""
        return 0

    @abc.abstractmethod
    def start(self, epoch: Epoch) -> ExecutorFacts:
        """Spawn the ranks, load, agree on the number of K/V blocks, warm up; returns when every rank is ready.

        Raises:
            ConfigError, ModelError, CapacityError: what a rank found wrong, as it found it.
            WorkerError: a rank died or raised anything else; names the rank.
            DeadlineError: not ready within `start_timeout`; names the ranks waited for.
        """

    @abc.abstractmethod
    def submit(self, step: StepInput) -> None:
        """Hand a step to every rank; at most two are in flight. Raises WorkerError when the group has failed."""

    @abc.abstractmethod
    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """The output of the oldest step in flight, or None when it does not come within `timeout` seconds.

        None waits for as long as the step's own deadline allows. Raises WorkerError when a rank died, stalled
        or raised.
        """

    @abc.abstractmethod
    def watch(self) -> None:
        """Raise WorkerError when a rank died, raised, is silent or is overdue; call it at least every 0.5 s."""

    @abc.abstractmethod
    def wait_fds(self) -> list[object]:
        """ZeroMQ sockets and descriptors that become readable when `collect` or `watch` has something to say."""

    @abc.abstractmethod
    def stop(self) -> None:
        """End the ranks, gently when they are idle; nothing of them is left afterwards. Never raises."""


def create_executor(config: EngineConfig, run_dir: Path) -> Executor:
    """The executor that `config.parallel.executor` names; it starts nothing yet."""
    if config.parallel.executor == "inprocess":
        from nanoengine.inprocess_executor import InProcessExecutor

        return InProcessExecutor(config)
    return MultiprocessExecutor(config, run_dir)


class MultiprocessExecutor(Executor):
    """One spawned process a rank, commanded over the authenticated channel."""

    def __init__(
        self,
        config: EngineConfig,
        run_dir: Path,
        entry: str = RANK_ENTRY,
        silence_limit: float = SILENCE_SECONDS,
        first_steps: int = FIRST_STEPS,
    ) -> None:
        """`entry` names the function that computes in the ranks' processes; it is given a `RankPort`."""
        self._config, self._run_dir = config, run_dir
        self._entry, self._silence_limit, self._first_steps = entry, silence_limit, first_steps
        self._group: WorkerGroup | None = None
        self._epoch: Epoch | None = None
        self._failure: NanoEngineError | None = None
        self._in_flight: collections.deque[int] = collections.deque()  # step ids, oldest first
        self._oldest_since = 0.0  # when the oldest step in flight became the one being computed
        self._num_collected = 0
        self._frames_rejected = 0  # in the groups that have ended

    @property
    def frames_rejected(self) -> int:
        """See `Executor.frames_rejected`."""
        return self._frames_rejected + (0 if self._group is None else self._group.frames_rejected)

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not yet collected."""
        return len(self._in_flight)

    def start(self, epoch: Epoch) -> ExecutorFacts:
        """See `Executor.start`."""
        assert self._group is None, "stop() comes before another start()"
        assert self._epoch is None or epoch > self._epoch, "an epoch is never used twice"

        began, limit = time.monotonic(), self._config.parallel.start_timeout
        self._epoch, self._failure, self._num_collected = epoch, None, 0
        self._in_flight.clear()
        group = WorkerGroup(self._config, self._run_dir, epoch, self._entry, self._silence_limit)
        self._group = group
        try:
            # Not torch.multiprocessing: no tensor crosses, and torch would cost the scheduler a second and 140 MiB.
            group.spawn(multiprocessing.get_context("spawn"))
            logger.info("started %d rank(s), epoch %d.%d", len(group.ranks), *epoch)
            group.await_all(lambda rank: rank.loaded is not None, "loading the model", began + limit, limit)
            loaded = [rank.loaded for rank in group.ranks if rank.loaded is not None]
            blocks = BlockCounts.least(BlockCounts(each.max_kv_blocks, each.max_host_blocks) for each in loaded)
            group.broadcast(Allocate(*blocks))
            group.await_all(lambda rank: rank.ready, "warming up", began + limit, limit)
        except BaseException:
            self._end(gently=False)
            raise
        logger.info("every rank is ready after %.1f s, %d K/V blocks", time.monotonic() - began, blocks.device)
        return ExecutorFacts(blocks.device, loaded[0].dtype, loaded[0].device, blocks.host)

    def submit(self, step: StepInput) -> None:
        """See `Executor.submit`. Raises ChannelError for a step that is too large, which harms nobody else."""
        group = self._running()
        assert len(self._in_flight) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
        assert step.epoch == self._epoch, "a step of another epoch"
        try:
            group.broadcast(step)
        except DeadlineError as error:
            self._guard(group.check)  # most likely it died
            raise self._fail(WorkerError(f"step {step.step_id} cannot be sent: {error.message}")) from error
        if not self._in_flight:
            self._oldest_since = time.monotonic()
        self._in_flight.append(step.step_id)
        group.control.submitted = step.step_id

    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """See `Executor.collect`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            group = self._running()
            if self._in_flight and not group.outputs:
                self._guard(group.receive_outputs)  # whoever has answered lives
            if not group.outputs and group.wants_check():
                self.watch()
            if group.outputs:
                return self._take(group.outputs.popleft())
            left = deadline - time.monotonic()
            if left <= 0 or not self._in_flight:
                return None
            group.wait(min(left, WATCH_SECONDS))

    def watch(self) -> None:
        """See `Executor.watch`."""
        group = self._running()
        self._guard(group.check)
        if not self._in_flight or group.outputs:
            return
        # The first steps may compile; and a process that was suspended was not computing.
        parallel = self._config.parallel
        limit = parallel.step_timeout
        if self._num_collected < self._first_steps:
            limit = max(limit, parallel.start_timeout)
        if time.monotonic() - max(self._oldest_since, group.awake_since) > limit:
            raise self._fail(self._overdue(group, limit))

    def wait_fds(self) -> list[object]:
        """See `Executor.wait_fds`."""
        return [] if self._group is None else self._group.fds()

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._end(gently=self._failure is None)

    def _running(self) -> WorkerGroup:
        if self._failure is not None:
            raise self._failure
        assert self._group is not None, "start() comes first"
        return self._group

    def _overdue(self, group: WorkerGroup, limit: float) -> WorkerError:
        step_id = self._in_flight[0]
        behind = min(group.ranks, key=lambda rank: (rank.words.ended, rank.words.begun))
        names = ", ".join(rank.describe() for rank in group.ranks if rank.words.ended < step_id) or "its output"
        return WorkerError(f"step {step_id} has not returned within {limit:g} s, waiting for {names}", behind.rank)

    def _take(self, output: StepOutput) -> StepOutput:
        expected = self._in_flight[0] if self._in_flight else 0
        if (output.epoch, output.step_id) != (self._epoch, expected):
            raise self._fail(
                WorkerError(f"rank 0 answered step {output.step_id} of epoch {output.epoch} instead of {expected}", 0)
            )
        self._in_flight.popleft()
        self._num_collected += 1
        self._oldest_since = time.monotonic()
        return output

    def _guard(self, call: Callable[[], None]) -> None:
        """Run something that may find a failed rank: then the group ends before the error goes on."""
        try:
            call()
        except ChannelError as error:
            raise self._fail(WorkerError(f"the link to a rank is broken: {error.message}")) from error
        except NanoEngineError as error:
            raise self._fail(error) from error.__cause__

    def _fail(self, error: NanoEngineError) -> NanoEngineError:
        self._end(gently=False)
        self._failure = error
        return error

    def _end(self, *, gently: bool) -> None:
        group, self._group = self._group, None
        self._in_flight.clear()
        if group is not None:
            self._frames_rejected += group.frames_rejected
            if gently:
                group.leave()
            else:
                group.kill()
