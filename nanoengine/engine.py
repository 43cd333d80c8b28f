"""The scheduler process: takes requests from front ends, drives the executor step by step, sends tokens back.

It owns every sequence and decides what runs; it knows no model code and no HTTP. `EngineCore` is the loop,
`main` the process entry (`python -m nanoengine.engine`, started by `engine_process.EngineProcess`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator

import zmq

from configs.engine import EngineConfig
from configs.errors import EngineError, NanoEngineError, StepError, to_wire
from nanoengine.engine_process import Bootstrap, receive_bootstrap
from nanoengine.engine_state import engine_state
from nanoengine.engine_stats import SETTLE_SECONDS, PastTotals, ReportTimes, StatusLine, engine_stats
from nanoengine.executor import MAX_IN_FLIGHT, Executor, ExecutorFacts, create_executor
from nanoengine.front_socket import FrontSocket
from nanoengine.messages import (
    Abort,
    AbortNamed,
    AddRequest,
    EngineFailure,
    Hello,
    Message,
    Ready,
    Recovering,
    ResetPrefixCache,
    StateRequest,
    Stats,
)
from nanoengine.outbox import Outbox
from nanoengine.processes import name_process
from nanoengine.recovery import Recovery
from nanoengine.scheduler import Scheduler, SchedulerLimits
from nanoengine.step import Epoch

logger = logging.getLogger(__name__)

# How often an idle loop looks after its workers, in seconds; each look costs a few microseconds.
WATCH_SECONDS = 0.5
# How long the last words of a failed engine may take to leave the socket.
LAST_WORDS_MS = 500
# How soon the loop comes back to a front end whose queue was full.
RETRY_SECONDS = 0.02


class EngineCore:
    """The scheduler's loop over one executor and the socket to the front ends."""

    def __init__(
        self, config: EngineConfig, executor: Executor, front: FrontSocket, facts: ExecutorFacts, epoch: Epoch
    ) -> None:
        self.config = config
        self.executor = executor
        self.front = front
        self.facts = facts
        self.epoch = epoch
        self.scheduler = Scheduler(limits_of(config, facts), epoch)
        self.recovery = Recovery(self.scheduler, config.parallel.max_restarts, config.parallel.restart_window)
        self.clients: set[str] = set()
        self.on_progress: Callable[[], None] | None = None  # called once, when front ends were sent a first token
        self._past = PastTotals()
        self._report_times = ReportTimes()
        self._status_line = StatusLine(config.server.log_stats_interval or 0.0)
        self._stopping = False
        self._next_watch = 0.0
        self._num_steps = 0  # committed in this epoch
        self._num_rejected = 0  # frames, when somebody looked last
        self._is_starting = False  # a group that is to replace a failed one
        self._untold: set[str] = set()  # clients that do not know yet whether the engine recovers
        self._wake_fds: list[int] = []
        self._listen()

    def wake_on(self, fd: int) -> None:
        """Also wake up when `fd` is readable (a signal came in)."""
        self._wake_fds.append(fd)
        self._listen()

    def _listen(self) -> None:
        """Wait for everybody there is. A new group of ranks has other sockets, and a failed one none."""
        self._poller = zmq.Poller()
        for source in (self.front.socket, *self._wake_fds, *self.executor.wait_fds()):
            self._poller.register(source, zmq.POLLIN)

    def stop(self) -> None:
        """Make `serve` return soon; safe in a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Run until `stop`; a group of ranks that fails is replaced, and open requests go on with the next one.

        Raises the WorkerError, or whatever else keeps a group from starting, once that is hopeless, after telling
        every front end. Any other exception is a fault of this process that came too often, and front ends are told
        nothing: with another process they go on.
        """
        try:
            self._park_spare()
            while not self._stopping:
                self._survive(self._wait)
                self._turn()
        except NanoEngineError as error:
            self._fail(error)
            raise

    def _turn(self) -> None:
        """One pass: what came back, what came in, the next step, and then the answers, while that step runs."""
        self._survive(self._compute)
        self._survive(self._take_messages)
        self._survive(self._schedule)
        if self.config.scheduler.check_invariants:
            self.scheduler.check_invariants()
        self._survive(self._tell)

    def _wait(self) -> None:
        self._poller.poll(self._timeout_ms())

    def _compute(self) -> None:
        self._attempt(self._advance_start if self.recovery.error else self._take_outputs)

    def _schedule(self) -> None:
        self.scheduler.expire()
        if self.recovery.error is None:
            self.recovery.review()
            self._attempt(self._submit_steps)

    def _tell(self) -> None:
        """Let the front ends know what happened, as far as they listen."""
        if self._untold:
            self._untold = {client_id for client_id in self._untold if not self.front.offer(client_id, self._state())}
        self.front.post(self.scheduler.take_deltas())
        now = time.monotonic()
        if self._report_times.is_due(now, self.scheduler.has_work):
            stats = self._stats()
            self._status_line.update(stats, now)
            self.front.post_stats(sorted(self.clients), self._past.under(stats))
        for client_id in self.front.flush():
            logger.info("front end %s is gone; its requests are aborted", client_id)
            self.scheduler.abort_client(client_id)
            self.scheduler.take_deltas()
            self.clients.discard(client_id)
        if self.on_progress is not None and self.scheduler.totals.num_generated_tokens:
            self.on_progress()
            self.on_progress = None

    @property
    def frames_rejected(self) -> int:
        """Frames of ranks and messages of front ends that were refused."""
        return self.executor.frames_rejected + self.front.rejected.total()

    def _stats(self) -> Stats:
        return engine_stats(self.scheduler, self.front.incarnation, self.recovery.stats, self.frames_rejected)

    def _take_outputs(self) -> None:
        while (output := self.executor.collect(0)) is not None:
            self.scheduler.commit(output)
            self._num_steps += 1
        now = time.monotonic()
        if now >= self._next_watch:
            self.executor.watch()
            self._next_watch = now + WATCH_SECONDS
            if self.frames_rejected != self._num_rejected:
                self._num_rejected = self.frames_rejected
                self._report_times.touch()

    def _submit_steps(self) -> None:
        """Keep the workers busy: under async scheduling the next step waits for them while they compute one."""
        wanted = MAX_IN_FLIGHT if self.config.scheduler.async_scheduling else 1
        while self.executor.num_in_flight < wanted:
            step = self.scheduler.schedule()
            if step is None:
                return
            self.executor.submit(step)

    # -- recovery -----------------------------------------------------------------------------------------------

    def _survive(self, call: Callable[[], None]) -> None:
        """Do a part of a turn. Should it raise what it may not, another scheduler takes the place of this one.

        Wherever this one broke off, its books cannot be trusted; the journals of the front ends can. So it is told to
        nobody, and front ends hand their requests in again, as to a process that was started anew; but the ranks and
        what they have loaded stay. Where that has happened too often, raises what it was given.
        """
        try:
            call()
        except NanoEngineError:
            raise
        except Exception:
            logger.exception("the scheduler failed, and starts over")
            old, made = self.scheduler, self.recovery.replace_scheduler()
            if made is None:
                raise
            self.front.post(old.take_deltas())  # each was true when it was made
            self.front.post_resubmit(self.clients | {client_id for client_id, _ in old.requests})
            self.scheduler = made
            self._report_times.touch()
            if self.recovery.error is None:
                self._attempt(self.executor.forget_steps)
            else:  # half way through a start, perhaps: again from the beginning
                self.executor.end_group()
                self._is_starting = False
                self._listen()

    def _attempt(self, call: Callable[[], None]) -> None:
        """Do something with the ranks. When they fail, they are ended, and others are to start; else raises.

        Where they only gave up a step they begin anew, and so does what they computed.
        """
        try:
            try:
                call()
            except StepError as error:
                logger.warning("a step is given up, and computed again: %s", error)
                self._report_times.touch()
                self.recovery.step_given_up(error)
                self.executor.forget_steps()
        except NanoEngineError as error:
            logger.error("the ranks of epoch %d.%d failed: %s", *self.epoch, error)
            self.executor.end_group()
            self._is_starting = False
            self._listen()
            if not self.recovery.failed(error, num_steps=self._num_steps):
                raise
            self._num_steps = 0
            self._untold = set(self.clients)
            self._report_times.touch()

    def _advance_start(self) -> None:
        """Start a group in place of the failed one and, when it is ready, go on; never waits for it."""
        if not self._is_starting:
            if time.monotonic() < self.recovery.next_start:
                return
            self.epoch = self._next_epoch()
            try:
                self.executor.begin_start(self.epoch)
            except OSError as error:  # no more processes or descriptors, perhaps for a moment only
                raise EngineError(f"no ranks can be started: {error}") from error
            self._is_starting = True
            self._listen()
        facts = self.executor.poll_start()
        if facts is None:
            return
        self._is_starting, self.facts = False, facts
        self.scheduler.new_epoch(self.epoch, facts.num_kv_blocks, facts.num_host_blocks)
        seconds = self.recovery.resumed()
        logger.info("serving again after %.1f s; %d open request(s) go on", seconds, len(self.scheduler.requests))
        self._untold = set(self.clients)
        self._report_times.touch()
        self._park_spare()

    def _park_spare(self) -> None:
        """Have ranks ready for the case that these fail, where that is asked for."""
        if self.config.parallel.warm_spare:
            with contextlib.suppress(OSError):  # without one the next start takes longer
                self.executor.park_spare(self._next_epoch())

    def _next_epoch(self) -> Epoch:
        return Epoch(self.epoch.incarnation, self.epoch.group + 1)

    def _state(self) -> Ready | Recovering:
        if self.recovery.error is not None:
            return Recovering(self.front.incarnation, to_wire(self.recovery.error))
        return self._ready()

    # -- front ends ---------------------------------------------------------------------------------------------

    def _timeout_ms(self) -> int:
        """How long the next poll may block."""
        if self.recovery.error and not self._is_starting:
            return max(0, math.ceil(1000 * min(WATCH_SECONDS, self.recovery.next_start - time.monotonic())))
        if self.executor.num_in_flight and not self.executor.wait_fds():
            return 0  # ranks in this process compute when they are asked for the outcome
        if self.front.has_pending or self._untold:
            return int(RETRY_SECONDS * 1000)
        if self._report_times.is_pending:
            return int(SETTLE_SECONDS * 1000)
        return int(WATCH_SECONDS * 1000)

    def _take_messages(self) -> None:
        for client_id, message in self.front.receive():
            self._report_times.touch()
            self._take_message(client_id, message)

    def _take_message(self, client_id: str, message: Message) -> None:
        if isinstance(message, AddRequest) and message.client_id == client_id:
            self._add(message)
        elif isinstance(message, Abort):
            named = {"request_id": message.request_id}
            logger.debug("a request is aborted: %s", message.reason, extra=named)
            self.scheduler.abort(client_id, message.request_id, message.index)
        elif isinstance(message, AbortNamed):
            for other in sorted(self.clients - {client_id}):
                self.front.send(other, message)
        elif isinstance(message, ResetPrefixCache):
            self.scheduler.blocks.reset_prefix_cache()
        elif isinstance(message, StateRequest):
            self.front.send(client_id, engine_state(self.scheduler, self.front.incarnation, time.time()))
        elif isinstance(message, Hello):
            self.clients.add(client_id)
            self._untold.add(client_id)
            self._past.hear(message.totals or {})
            self.front.post_stats([client_id], self._past.under(self._stats()))  # or it would show totals of 0
        else:
            self.front.reject("unexpected", f"front end {client_id!r:.100} sent a {type(message).__name__}")

    def _add(self, message: AddRequest) -> None:
        try:
            self.scheduler.add(message)
        except Exception as error:
            # It is to blame, and must not come again; what is left of it goes with this scheduler.
            refusal = Outbox(self.scheduler.clock)
            refusal.refuse(message, EngineError(f"the scheduler failed: {type(error).__name__}: {error}"))
            self.front.post(refusal.take())
            raise

    def _ready(self) -> Ready:
        return Ready(
            incarnation=self.front.incarnation,
            num_kv_blocks=self.facts.num_kv_blocks,
            block_size=self.config.cache.block_size,
            max_model_len=self.config.max_model_len,
            dtype=self.facts.dtype,
            device=self.facts.device,
            group=self.epoch.group,
        )

    def _fail(self, error: NanoEngineError) -> None:
        """Tell everybody, as far as they listen: open requests end with the error, and nothing follows."""
        logger.error("the engine ends: %s", error)
        try:
            self.scheduler.fail_all(error)
            self.front.post(self.scheduler.take_deltas())
            self.front.flush()
        except Exception:  # its books may be what failed; the last word says enough
            logger.exception("open requests cannot be told one by one")
        for client_id in sorted(self.clients):
            self.front.send(client_id, EngineFailure(self.front.incarnation, to_wire(error)))
        self.front.close(LAST_WORDS_MS)


def limits_of(config: EngineConfig, facts: ExecutorFacts) -> SchedulerLimits:
    """What the scheduler must respect, out of the settings and of what the workers found."""
    checkpoint = config.resolved_checkpoint
    return SchedulerLimits(
        max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        max_num_seqs=config.scheduler.max_num_seqs,
        max_model_len=config.max_model_len,
        num_kv_blocks=facts.num_kv_blocks,
        block_size=config.cache.block_size,
        num_host_blocks=facts.num_host_blocks,
        preemption_mode=config.scheduler.preemption_mode,
        eos_token_ids=frozenset(checkpoint.eos_token_ids),
        vocab_size=checkpoint.vocab_size,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        enable_chunked_prefill=config.scheduler.enable_chunked_prefill,
        policy=config.scheduler.policy,
        max_decode_gap=config.scheduler.max_decode_gap or 0.0,
    )


@contextlib.contextmanager
def _terminated_by_signal(core: EngineCore) -> Iterator[None]:
    """SIGTERM is only recorded; the loop wakes up and acts."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    core.wake_on(read_fd)
    previous = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: core.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the ranks' leaving
        signal.set_wakeup_fd(previous)
        os.close(read_fd)
        os.close(write_fd)


def run(bootstrap: Bootstrap) -> None:
    """Start the ranks, serve until SIGTERM, leave nothing behind."""
    config = bootstrap.config
    executor = create_executor(config, bootstrap.run_dir)
    front = FrontSocket(bootstrap.front_address, bootstrap.incarnation)
    try:
        epoch = Epoch(bootstrap.incarnation, 1)
        facts = executor.start(epoch)
        core = EngineCore(config, executor, front, facts, epoch)
        core.on_progress = bootstrap.report_progress
        logger.info(
            "serving %s with %d K/V blocks of %d tokens (%s on %s) and %d on the host",
            config.served_model_name, facts.num_kv_blocks, config.cache.block_size, facts.dtype, facts.device,
            facts.num_host_blocks,
        )  # fmt: skip
        # What was loaded so far lives as long as the process; the many small rows of a step die young, without cycles.
        gc.freeze()
        gc.set_threshold(100_000, 50, 100)
        with _terminated_by_signal(core):
            bootstrap.report_ready()
            core.serve()
    finally:
        executor.stop()
        front.close()


def main() -> None:
    """Process entry; exits with 0 after SIGTERM and with 1 when the engine failed.

    What was found to be hopeless (an error of our tree) is final; after anything else its owner starts another one.
    """
    bootstrap = receive_bootstrap()
    name_process("nano-scheduler")
    try:
        run(bootstrap)
    except Exception as error:
        if not isinstance(error, NanoEngineError):
            logger.exception("the scheduler failed")
        bootstrap.report_failure(error, is_final=isinstance(error, NanoEngineError))
        sys.exit(1)


if __name__ == "__main__":
    main()
