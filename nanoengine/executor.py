"""Runs steps on a group of ranks: the interface the engine loop drives, and the choice of implementation.

It knows neither scheduling nor models; the ranks' code is named by a string and imported where it runs.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import logging
import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from configs.engine import EngineConfig
from configs.errors import ChannelError, DeadlineError, NanoEngineError, StepError, WorkerError
from nanoengine.channel import Allocate, BlockCounts
from nanoengine.step import Epoch, Forget, StepInput, StepOutput
from nanoengine.step_deadline import StepDeadline
from nanoengine.worker_group import WATCH_SECONDS, WorkerGroup

logger = logging.getLogger(__name__)

RANK_ENTRY = "workers.worker:run_worker"
MAX_IN_FLIGHT = 2
SILENCE_SECONDS = 10.0
"""A rank whose heartbeat is older than this counts as stopped (six times this while it loads)."""
SPARE_SECONDS = 10.0
"""Spare ranks that die before they are so old are not replaced: others would fare no better."""
FIRST_STEPS = 3
"""So many steps of an epoch may take as long as a start: a prefill, a decode and a mixed one may each compile."""


@dataclasses.dataclass(frozen=True)
class ExecutorFacts:
    """What was learnt while the ranks started; numbers of blocks are the minimum over ranks."""

    num_kv_blocks: int
    dtype: str
    device: str
    num_host_blocks: int = 0


class _InFlight(NamedTuple):
    """A step that the ranks were given."""

    step_id: int
    num_prompt_tokens: int  # and decodes that are not steady; 0: steady decodes alone


class Executor(abc.ABC):
    """One group of ranks at a time. All methods belong to one thread; `stop` is harmless twice and in any phase.

    A failure of any rank is the failure of the group: the ranks are killed and reaped before the error is
    raised, and every later `submit`, `collect` and `watch` raises it again. `stop`, and then `start` or `begin_start`
    with a higher epoch, begin a new group afterwards.

    A step that finds no memory is no such failure where the ranks can go on: `collect` and `watch` raise StepError,
    and `forget_steps` lets the same ranks begin anew.
    """

    _started: ExecutorFacts | None = None  # of a `begin_start` that did it all

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

    def begin_start(self, epoch: Epoch) -> None:
        """Begin what `start` does without waiting for it: call `poll_start` until it is done.

        Raises what `start` does. This one, for ranks that cannot start by themselves, does it all.
        """
        self._started = self.start(epoch)

    def poll_start(self) -> ExecutorFacts | None:
        """What was learnt once every rank is ready, else None; call it when `wait_fds` say so, and every 0.5 s.

        Raises what `start` does; the ranks are gone then.
        """
        return self._started

    def park_spare(self, epoch: Epoch) -> None:  # noqa: B027 - there may be nothing to do
        """Prepare the group that a later `begin_start(epoch)` will want, as far as that costs no memory of a model.

        Harmless when there is one for this epoch. Ranks that are no processes cannot be prepared: nothing is done.
        """

    @abc.abstractmethod
    def submit(self, step: StepInput) -> None:
        """Hand a step to every rank; at most two are in flight. Raises WorkerError when the group has failed."""

    @abc.abstractmethod
    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """The output of the oldest step in flight, or None when it does not come within `timeout` seconds.

        None waits for as long as the step's own deadline allows. Raises WorkerError when a rank died, stalled
        or raised, and StepError when the ranks gave up a step.
        """

    @abc.abstractmethod
    def watch(self) -> None:
        """Raise WorkerError when a rank died, raised, is silent or is overdue; call it at least every 0.5 s.

        Raises StepError as `collect` does.
        """

    @abc.abstractmethod
    def forget_steps(self) -> None:
        """Make every step so far void: no output of theirs follows, and the ranks forget all rows.

        Whatever they are doing; nothing is waited for. Steps go on with a higher number. Raises WorkerError.
        """

    @abc.abstractmethod
    def wait_fds(self) -> list[object]:
        """ZeroMQ sockets and descriptors that become readable when `collect` or `watch` has something to say."""

    def end_group(self) -> None:
        """End the ranks of a group that failed, but not those of a spare one. Never raises."""
        self.stop()

    @abc.abstractmethod
    def stop(self) -> None:
        """End all ranks, gently when they are idle; nothing of them is left afterwards. Never raises."""


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
        self._spare: WorkerGroup | None = None  # parked, for the next epoch
        self._parked_at = 0.0
        self._epoch: Epoch | None = None
        self._failure: NanoEngineError | None = None
        self._began = 0.0  # when the start of the group began
        self._allocated: BlockCounts | None = None  # what its ranks were told to allocate
        self._deadline = StepDeadline(config.parallel.step_timeout)
        self._in_flight: collections.deque[_InFlight] = collections.deque()  # oldest first
        self._oldest_since = 0.0  # when the oldest step in flight became the one being computed
        self._num_collected = 0
        self._newest_step = self._void_step = 0  # the last one submitted; all up to the other one are void
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
        self.begin_start(epoch)
        try:
            while (facts := self.poll_start()) is None:
                left = self._began + self._config.parallel.start_timeout - time.monotonic()
                self._running().wait(min(max(left, 0), WATCH_SECONDS))
        except BaseException:
            self._end(gently=False)
            raise
        return facts

    def begin_start(self, epoch: Epoch) -> None:
        """See `Executor.begin_start`."""
        assert self._group is None, "stop() comes before another start()"
        assert self._epoch is None or epoch > self._epoch, "an epoch is never used twice"
        self._began = time.monotonic()
        self._epoch, self._failure, self._num_collected, self._allocated = epoch, None, 0, None
        self._newest_step = self._void_step = 0
        self._in_flight.clear()
        spare, self._spare = self._spare, None
        if spare is not None and spare.epoch == epoch and spare.begin():
            self._group = spare
            logger.info("%d spare rank(s) take over, epoch %d.%d", len(spare.ranks), *epoch)
            return
        if spare is not None:
            spare.kill()
        self._group = self._spawn(epoch, parked=False)
        logger.info("started %d rank(s), epoch %d.%d", len(self._group.ranks), *epoch)

    def park_spare(self, epoch: Epoch) -> None:
        """See `Executor.park_spare`: processes with their imports done."""
        if self._spare is None or self._spare.epoch != epoch:
            self._drop_spare()
            self._spare, self._parked_at = self._spawn(epoch, parked=True), time.monotonic()

    def _look_after_spare(self) -> None:
        """Replace spare ranks that died: when they are wanted, there is no time to wait for others."""
        spare = self._spare
        if spare is None or not spare.has_ended:
            return
        self._drop_spare()
        if time.monotonic() - self._parked_at < SPARE_SECONDS:
            logger.warning("the spare ranks died soon after their start; there are none until the next recovery")
            return
        logger.warning("the spare ranks died; others are started")
        with contextlib.suppress(OSError):  # no more processes or descriptors: without spare ones it takes longer
            self.park_spare(spare.epoch)

    def _spawn(self, epoch: Epoch, *, parked: bool) -> WorkerGroup:
        group = WorkerGroup(self._config, self._run_dir, epoch, self._entry, self._silence_limit, parked=parked)
        try:
            # Not torch.multiprocessing: no tensor crosses, and torch would cost the scheduler a second and 140 MiB.
            group.spawn(multiprocessing.get_context("spawn"))
        except BaseException:
            group.kill()
            raise
        return group

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.kill()

    def poll_start(self) -> ExecutorFacts | None:
        """See `Executor.poll_start`."""
        group = self._running()
        try:
            return self._advance_start(group)
        except BaseException:
            self._end(gently=False)
            raise

    def _advance_start(self, group: WorkerGroup) -> ExecutorFacts | None:
        limit = self._config.parallel.start_timeout
        deadline = self._began + limit
        if self._allocated is None:
            if not group.have_all(lambda rank: rank.loaded is not None, "loading the model", deadline, limit):
                return None
            fitting = [rank.loaded for rank in group.ranks if rank.loaded is not None]
            self._allocated = BlockCounts.least(
                BlockCounts(each.max_kv_blocks, each.max_host_blocks) for each in fitting
            )
            group.broadcast(Allocate(*self._allocated))
        if not group.have_all(lambda rank: rank.ready, "warming up", deadline, limit):
            return None
        blocks, loaded = self._allocated, group.ranks[0].loaded
        assert loaded is not None
        logger.info("every rank is ready after %.1f s, %d K/V blocks", time.monotonic() - self._began, blocks.device)
        return ExecutorFacts(blocks.device, loaded.dtype, loaded.device, blocks.host)

    def submit(self, step: StepInput) -> None:
        """See `Executor.submit`. Raises ChannelError for a step that is too large, which harms nobody else."""
        group = self._running()
        assert len(self._in_flight) < MAX_IN_FLIGHT, "collect() comes before a third submit()"
        assert step.epoch == self._epoch, "a step of another epoch"
        self._newest_step = step.step_id  # whomever it reaches
        self._broadcast(group, step, f"step {step.step_id}")
        if not self._in_flight:
            self._oldest_since = time.monotonic()
        self._in_flight.append(_InFlight(step.step_id, sum(len(row.token_ids) for row in step.states)))
        group.control.submitted = step.step_id

    def _broadcast(self, group: WorkerGroup, message: StepInput | Forget, name: str) -> None:
        try:
            group.broadcast(message)
        except DeadlineError as error:
            self._guard(group.check)  # most likely it died
            raise self._fail(WorkerError(f"{name} cannot be sent: {error.message}")) from error

    def forget_steps(self) -> None:
        """See `Executor.forget_steps`."""
        group = self._running()
        self._void_step = self._newest_step
        self._in_flight.clear()
        self._broadcast(group, Forget(), "the word to begin anew")

    def collect(self, timeout: float | None = 0) -> StepOutput | None:
        """See `Executor.collect`."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            group = self._running()
            if self._in_flight and not group.outputs:
                self._guard(group.receive_outputs)  # whoever has answered lives
            if not group.outputs and group.wants_check():
                self.watch()
            while group.outputs:
                output = group.outputs.popleft()
                if output.step_id > self._void_step:
                    return self._take(output)
            self._look_for_given_up(group)
            left = deadline - time.monotonic()
            if left <= 0 or not self._in_flight:
                return None
            group.wait(min(left, WATCH_SECONDS))

    def watch(self) -> None:
        """See `Executor.watch`."""
        group = self._running()
        self._guard(group.check)
        self._look_after_spare()
        if group.outputs:
            return
        self._look_for_given_up(group)
        if not self._in_flight:
            return
        # The first steps may compile; and a process that was suspended was not computing.
        parallel = self._config.parallel
        limit = self._deadline.limit(self._in_flight[0].num_prompt_tokens)
        if self._num_collected < self._first_steps:
            limit = max(parallel.step_timeout, parallel.start_timeout)
        if time.monotonic() - max(self._oldest_since, group.awake_since) > limit:
            raise self._fail(self._overdue(group, limit))

    def wait_fds(self) -> list[object]:
        """See `Executor.wait_fds`."""
        return [] if self._group is None else self._group.fds()

    def stop(self) -> None:
        """See `Executor.stop`."""
        self._drop_spare()
        self._end(gently=self._failure is None)

    def end_group(self) -> None:
        """See `Executor.end_group`."""
        self._end(gently=False)

    def _running(self) -> WorkerGroup:
        if self._failure is not None:
            raise self._failure
        assert self._group is not None, "start() comes first"
        return self._group

    def _overdue(self, group: WorkerGroup, limit: float) -> WorkerError:
        """Whom a step waits for. A stopped rank is to blame rather than those that wait for it in a collective."""
        step_id = self._in_flight[0].step_id
        late = [rank for rank in group.ranks if rank.words.ended < step_id]
        behind = min(group.ranks, key=lambda rank: (not rank.is_stopped, rank.words.ended, rank.words.begun))
        stopped = {rank: ", stopped by a signal" for rank in late if rank.is_stopped}
        names = ", ".join(rank.describe() + stopped.get(rank, "") for rank in late) or "its output"
        message = f"step {step_id} has not returned within {limit:g} s, waiting for {names}"
        group.log_stacks(late)
        return WorkerError(message, behind.rank, "overdue")

    def _look_for_given_up(self, group: WorkerGroup) -> None:
        """Raise StepError when a rank has given up, once the steps before that one are collected."""
        for rank in group.ranks:
            given_up = rank.given_up
            if given_up is None or given_up.step_id <= self._void_step:
                continue
            if not self._in_flight or given_up.step_id <= self._in_flight[0].step_id:
                step_id, reason = given_up.step_id, given_up.reason
                message = f"rank {rank.rank} found no memory for step {step_id} ({reason})"
                raise StepError(message, rank.rank, step_id)

    def _take(self, output: StepOutput) -> StepOutput:
        expected = self._in_flight[0].step_id if self._in_flight else 0
        if (output.epoch, output.step_id) != (self._epoch, expected):
            raise self._fail(
                WorkerError(f"rank 0 answered step {output.step_id} of epoch {output.epoch} instead of {expected}", 0)
            )
        now, step = time.monotonic(), self._in_flight.popleft()
        if self._num_collected >= self._first_steps:
            self._deadline.observe(step.num_prompt_tokens, now - self._oldest_since)
        self._num_collected += 1
        self._oldest_since = now
        return output

    def _guard(self, call: Callable[[], None]) -> None:
        """Run something that may find a failed rank: then the group ends before the error goes on."""
        try:
            call()
        except ChannelError as error:
            message = f"the link to a rank is broken: {error.message}"
            raise self._fail(WorkerError(message, reason="broken")) from error
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
