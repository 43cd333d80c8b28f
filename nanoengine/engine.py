"""The scheduler process: takes requests from front ends, drives the executor step by step, sends tokens back.

It owns every sequence and decides what runs; it knows no model code and no HTTP. `EngineCore` is the loop,
`main` the process entry (`python -m nanoengine.engine`, started by `engine_process.EngineProcess`).
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator

import zmq

from configs.engine import EngineConfig
from configs.errors import NanoEngineError, to_wire
from nanoengine.engine_process import Bootstrap, receive_bootstrap
from nanoengine.executor import MAX_IN_FLIGHT, Executor, ExecutorFacts, create_executor
from nanoengine.front_socket import FrontSocket
from nanoengine.messages import Abort, AbortNamed, AddRequest, EngineFailure, Hello, Ready, ResetPrefixCache
from nanoengine.processes import configure_logging, name_process
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
        self.scheduler = Scheduler(limits_of(config, facts), epoch)
        self.clients: set[str] = set()
        self._stopping = False
        self._next_watch = 0.0
        self._poller = zmq.Poller()
        self._poller.register(front.socket, zmq.POLLIN)
        for source in executor.wait_fds():
            self._poller.register(source, zmq.POLLIN)

    def wake_on(self, fd: int) -> None:
        """Also wake up when `fd` is readable (a signal came in)."""
        self._poller.register(fd, zmq.POLLIN)

    def stop(self) -> None:
        """Make `serve` return soon; safe in a signal handler."""
        self._stopping = True

    def serve(self) -> None:
        """Run until `stop`. Raises WorkerError when the group of ranks fails, after telling every front end."""
        try:
            while not self._stopping:
                self._poller.poll(self._timeout_ms())
                self._turn()
        except NanoEngineError as error:
            self._fail(error)
            raise

    def _turn(self) -> None:
        """One pass: what came back, what came in, the next step, and then the answers, while that step runs."""
        while (output := self.executor.collect(0)) is not None:
            self.scheduler.commit(output)
        now = time.monotonic()
        if now >= self._next_watch:
            self.executor.watch()
            self._next_watch = now + WATCH_SECONDS
        self._take_messages()
        self.scheduler.expire()
        self._submit_steps()
        if self.config.scheduler.check_invariants:
            self.scheduler.check_invariants()
        self.front.post(self.scheduler.take_deltas())
        for client_id in self.front.flush():
            logger.info("front end %s is gone; its requests are aborted", client_id)
            self.scheduler.abort_client(client_id)
            self.scheduler.take_deltas()
            self.clients.discard(client_id)

    @property
    def frames_rejected(self) -> int:
        """Frames of ranks and messages of front ends that were refused."""
        return self.executor.frames_rejected + self.front.rejected.total()

    def _submit_steps(self) -> None:
        """Keep the workers busy: under async scheduling the next step waits for them while they compute one."""
        wanted = MAX_IN_FLIGHT if self.config.scheduler.async_scheduling else 1
        while self.executor.num_in_flight < wanted:
            step = self.scheduler.schedule()
            if step is None:
                return
            self.executor.submit(step)

    def _timeout_ms(self) -> int:
        """How long the next poll may block."""
        if self.executor.num_in_flight and not self.executor.wait_fds():
            return 0  # ranks in this process compute when they are asked for the outcome
        if self.front.has_pending:
            return int(RETRY_SECONDS * 1000)
        return int(WATCH_SECONDS * 1000)

    def _take_messages(self) -> None:
        for client_id, message in self.front.receive():
            if isinstance(message, AddRequest) and message.client_id == client_id:
                self.scheduler.add(message)
            elif isinstance(message, Abort):
                logger.debug("request %s is aborted: %s", message.request_id, message.reason)
                self.scheduler.abort(client_id, message.request_id, message.index)
            elif isinstance(message, AbortNamed):
                for other in sorted(self.clients - {client_id}):
                    self.front.send(other, message)
            elif isinstance(message, ResetPrefixCache):
                self.scheduler.blocks.reset_prefix_cache()
            elif isinstance(message, Hello):
                self.clients.add(client_id)
                self.front.send(client_id, self._ready())
            else:
                self.front.reject("unexpected", f"front end {client_id!r:.100} sent a {type(message).__name__}")

    def _ready(self) -> Ready:
        return Ready(
            incarnation=self.front.incarnation,
            num_kv_blocks=self.facts.num_kv_blocks,
            block_size=self.config.cache.block_size,
            max_model_len=self.config.max_model_len,
            dtype=self.facts.dtype,
            device=self.facts.device,
        )

    def _fail(self, error: NanoEngineError) -> None:
        """Tell everybody, as far as they listen: open requests end with the error, and nothing follows."""
        logger.error("the engine ends: %s", error)
        self.scheduler.fail_all(error)
        self.front.post(self.scheduler.take_deltas())
        self.front.flush()
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
    """Process entry; exits with 0 after SIGTERM and with 1 when the engine failed."""
    bootstrap = receive_bootstrap()
    name_process("nano-scheduler")
    configure_logging(bootstrap.config.server.log_level, "scheduler")
    try:
        run(bootstrap)
    except Exception as error:
        if not isinstance(error, NanoEngineError):
            logger.exception("the scheduler failed")
        bootstrap.report_failure(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
