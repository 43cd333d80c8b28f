"""The ranks of one epoch as one failure unit: spawned, watched, and ended together; it knows no steps' order.

When one rank dies, raises or falls silent, the others may be waiting for it inside a collective, so whoever
notices (`check`) kills them all (`kill`) before the error goes further.
"""

from __future__ import annotations

import collections
import logging
import os
import secrets
import select
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import wait as wait_for_sentinels
from multiprocessing.context import SpawnContext
from pathlib import Path

import zmq

from configs.engine import EngineConfig
from configs.errors import DeadlineError, EngineError, NanoEngineError, WorkerError, from_wire
from nanoengine import processes
from nanoengine.channel import KEY_BYTES, Message, Stop, encode
from nanoengine.control_block import ControlBlock, anonymous_file
from nanoengine.rank_process import InheritedFd, RankArguments, RankProcess
from nanoengine.step import Epoch, StepOutput

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
LEAVE_SECONDS = 1.5
STACK_SECONDS = 0.2
MAX_STACK_WAITS = 5
"""So often they are asked at most, so long apart, where ranks that are about to be killed stand."""


class WorkerGroup:
    """Handles of all ranks of one epoch, the memory they share, and their common end."""

    def __init__(
        self,
        config: EngineConfig,
        run_dir: Path,
        epoch: Epoch,
        entry: str,
        silence_limit: float,
        *,
        parked: bool = False,
    ) -> None:
        """Make the shared memory; `spawn` starts the processes.

        The ranks of a `parked` group import what they need and wait for `begin`.
        """
        self.epoch = epoch
        world_size = config.parallel.world_size
        self.outputs: collections.deque[StepOutput] = collections.deque()
        self.ranks: list[RankProcess] = []
        self._silence_limit = silence_limit
        self._poller = zmq.Poller()  # of all that `fds` names
        self._sentinels = select.poll()
        self.awake_since = self._last_check = time.monotonic()
        self._control_fd = anonymous_file("nanoengine-control")
        self._collective_fd = anonymous_file("nanoengine-collective") if world_size > 1 else None
        self.control = ControlBlock(self._control_fd, world_size)
        key = secrets.token_bytes(KEY_BYTES)
        try:
            for rank in range(world_size):
                arguments = RankArguments(
                    entry=entry,
                    config=config,
                    rank=rank,
                    epoch=epoch,
                    key=key,
                    socket_path=run_dir / f"g{epoch.group}r{rank}",
                    run_dir=run_dir,
                    control=InheritedFd(self._control_fd),
                    collective=None if self._collective_fd is None else InheritedFd(self._collective_fd),
                    stacks=InheritedFd(anonymous_file("nanoengine-stacks")),
                    parent_pid=os.getpid(),
                    parked=parked,
                )
                self.ranks.append(RankProcess(arguments, self.control.ranks[rank]))
        except BaseException:
            self.kill()
            raise

    def spawn(self, context: SpawnContext) -> None:
        """Start every rank's process; from then on they load in parallel."""
        # Before the first rank: starting it unblocks SIGINT, which the ranks must inherit blocked.
        processes.in_lasting_thread(resource_tracker.ensure_running)
        for rank in self.ranks:
            processes.in_lasting_thread(lambda rank=rank: rank.spawn(context))  # type: ignore[misc]
            rank.listen()
        self._close_fds()  # the ranks have theirs
        for source in self.fds():
            self._poller.register(source, zmq.POLLIN)
        for rank in self.ranks:
            if rank.sentinel is not None:
                self._sentinels.register(rank.sentinel, select.POLLIN)
        self.awake_since = self._last_check = time.monotonic()

    def begin(self) -> bool:
        """Let a parked group load the model; False when it cannot: a rank is gone or stopped."""
        try:
            self.check(starting=True)
            if any(rank.is_stopped for rank in self.ranks):
                return False
            for rank in self.ranks:
                rank.begin()
            return True
        except NanoEngineError as error:
            logger.warning("the spare ranks are of no use: %s", error)
            return False

    def fds(self) -> list[object]:
        """What becomes readable when a rank said something or ended."""
        sentinels = [rank.sentinel for rank in self.ranks if rank.sentinel is not None]
        return [*(rank.link.socket for rank in self.ranks), *sentinels]

    def wait(self, timeout: float) -> None:
        """Block until a rank said something or ended, for at most `timeout` seconds."""
        self._poller.poll(max(0, round(timeout * 1000)))

    def broadcast(self, message: Message) -> None:
        """Send one message to every rank, packed once. Raises ChannelError, having sent nothing, when too large."""
        channel, payload = encode(message)
        for rank in self.ranks:
            rank.link.send_encoded(channel, payload)

    def receive_outputs(self) -> None:
        """Take in what rank 0 has said, for whoever is in a hurry. Raises ChannelError when the link is broken."""
        self.outputs.extend(self.ranks[0].receive())

    @property
    def has_ended(self) -> bool:
        """Whether a rank's process is gone."""
        return bool(self._sentinels.poll(0))  # much cheaper than asking after each exit code

    @property
    def frames_rejected(self) -> int:
        """Frames that either end of a link has refused, and connections that were turned away."""
        return sum(rank.link.rejected.total() + rank.words.rejected for rank in self.ranks)

    def wants_check(self) -> bool:
        """Whether `check` may find something: a rank spoke or ended, or the last one is a while ago. Costs little."""
        # Often enough for a rank that falls silent not to be taken for a suspension of this process.
        if time.monotonic() - self._last_check > min(WATCH_SECONDS, self._silence_limit / 4):
            return True
        return self.has_ended or any(rank.link.is_readable() for rank in self.ranks)

    def check(self, starting: bool = False) -> None:
        """Raise when a rank died, failed or fell silent; the cause is preferred to its consequences.

        Raises:
            NanoEngineError: while `starting`, what a rank found wrong with settings, model or memory, as it found it.
            WorkerError: anything else; names the rank.
            ChannelError: a link is broken.
        """
        self._notice_suspension()
        # Whose pipe is closed has an exit code only a moment later. So each is asked once: one that got its own between
        # two looks would count as dead before its last words were awaited.
        some_ended = self.has_ended
        ended = [rank for rank in self.ranks if some_ended and rank.exit_code is not None]
        for rank in self.ranks:
            self.outputs.extend(rank.receive(ended=rank in ended))
        dead = [rank for rank in ended if rank.failed is None]
        failed = [rank for rank in self.ranks if rank.failed is not None]
        if dead:
            how = processes.describe_exit(dead[0].exit_code)
            raise WorkerError(f"rank {dead[0].rank} died ({how})", dead[0].rank, "died")
        if failed:
            # A rank that waited in vain for another is rather a consequence.
            raise _error_of(min(failed, key=lambda rank: (_waited_in_vain(rank), rank.rank)), starting)
        self._check_silence()

    def have_all(self, reached: Callable[[RankProcess], bool], what: str, deadline: float, limit: float) -> bool:
        """Whether `reached` holds for each rank of a group that is starting; does not wait.

        Raises:
            NanoEngineError: as `check`.
            DeadlineError: it does not, and time.monotonic() came to `deadline`; names the ranks waited for.
        """
        self.check(starting=True)
        waiting = [rank for rank in self.ranks if not reached(rank)]
        if waiting and time.monotonic() >= deadline:
            names = ", ".join(rank.describe() for rank in waiting)
            raise DeadlineError(f"{what}: not done within {limit:g} s (start_timeout), waiting for {names}")
        return not waiting

    def log_stacks(self, ranks: list[RankProcess]) -> None:
        """Log where each of these ranks stands in its Python code, stopped ones included; takes a moment."""
        states = [(rank, rank.describe()) for rank in ranks]  # before they go on
        asked = [(rank, state) for rank, state in states if rank.ask_for_stacks()]
        if not asked:
            return
        for _ in range(MAX_STACK_WAITS):
            time.sleep(STACK_SECONDS)
            if all("Current thread" in rank.read_stacks() for rank, _ in asked):
                break
        for rank, state in asked:
            logger.error("%s stands at:\n%s", state, rank.read_stacks() or "(it did not say)")

    def leave(self, timeout: float = LEAVE_SECONDS) -> None:
        """Let idle ranks leave together; whoever has not left after `timeout` seconds is killed. Never raises."""
        deadline = time.monotonic() + timeout
        self.control.request_stop()
        # A rank that is still loading would hear it too late.
        if not self.ranks or not all(rank.ready for rank in self.ranks) or not self._ask_to_leave():
            deadline = 0
        while (left := deadline - time.monotonic()) > 0:
            alive = [rank for rank in self.ranks if rank.exit_code is None]
            if not alive:
                break
            wait_for_sentinels([rank.sentinel for rank in alive if rank.sentinel is not None], left)
        self.kill()

    def _ask_to_leave(self) -> bool:
        try:
            for rank in self.ranks:
                if rank.exit_code is None:
                    rank.link.send(Stop(), timeout=0)
            return True
        except EngineError as error:
            logger.warning("a rank cannot be asked to leave: %s", error)
            return False

    def kill(self) -> None:
        """SIGKILL and reap whoever is left, and release everything the group holds. Harmless twice; never raises."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            if not rank.reap():
                logger.error("%s does not end although it was killed", rank.describe())
        self._close_fds()
        self.control.close()
        self.ranks = []

    def _close_fds(self) -> None:
        for fd in (self._control_fd, self._collective_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._control_fd = self._collective_fd = -1

    def _notice_suspension(self) -> None:
        """After Ctrl-Z and fg this process may run before its ranks do: their silence counts from then on."""
        now = time.monotonic()
        if now - self._last_check > self._silence_limit / 2:
            self.awake_since = now
        self._last_check = now

    def _check_silence(self) -> None:
        now = time.monotonic()
        for rank in self.ranks:
            seconds = now - max(rank.words.heartbeat / 1e9, self.awake_since)
            # While it imports and loads, a rank may hold Python's lock for long (a cold disk).
            patience = self._silence_limit * (1 if rank.ready else 6)
            if seconds > patience:
                message = f"{rank.describe()} has given no sign of life for {seconds:.1f} s"
                message += ", stopped by a signal" if rank.is_stopped else ""
                self.log_stacks([rank])
                raise WorkerError(message, rank.rank, "silent")


def _waited_in_vain(rank: RankProcess) -> bool:
    return rank.failed is not None and rank.failed.error.get("kind") in ("DeadlineError", "WorkerError")


def _error_of(rank: RankProcess, starting: bool) -> NanoEngineError:
    """What a rank's failure is raised as: what the user can mend keeps its type, the rest is a WorkerError."""
    assert rank.failed is not None
    error = from_wire(rank.failed.error)
    if starting and not isinstance(error, EngineError):
        logger.debug("rank %d:\n%s", rank.rank, rank.failed.traceback)
        return error
    logger.error("rank %d failed:\n%s", rank.rank, rank.failed.traceback)
    return WorkerError(f"rank {rank.rank} failed: {error.message}", rank.rank, "raised")
