"""One rank as a process: how it is spawned, its first function, and the scheduler's handle on it.

It knows the code that computes only as a string, `module:function`, which is imported in the child.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import time
import traceback
import types
from collections.abc import Callable, Iterator
from multiprocessing import reduction
from multiprocessing.connection import wait as wait_for_sentinels
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import zmq

from configs.engine import EngineConfig
from configs.errors import to_wire
from nanoengine import processes
from nanoengine.channel import Begin, Direction, Failed, Hello, Link, Loaded, RankPort, Ready
from nanoengine.control_block import ControlBlock, Phase, RankWords
from nanoengine.listener import await_listener
from nanoengine.read_ahead import read_ahead
from nanoengine.step import Epoch, GaveUp, StepOutput
from nanoengine.watched import guard_threads, nothing_more, start_thread

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
_MAX_STACK_BYTES = 2**16
_REAP_SECONDS = 5.0
_LISTEN_SECONDS = 30.0
# What a rank said last may still be on its way through ZeroMQ's threads when it has ended: one that left by itself has
# sent it (`_leave`), one that was killed most likely has nothing to say.
_LAST_WORDS_SECONDS, _KILLED_WORDS_SECONDS = 2.0, 0.2


class InheritedFd:
    """A descriptor that a spawned process gets with its arguments; in the child `fd` is its own copy."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Any, ...]:
        return _inherited, (reduction.DupFd(self.fd),)


def _inherited(duplicate: Any) -> InheritedFd:
    return InheritedFd(duplicate.detach())


@dataclasses.dataclass(frozen=True)
class RankArguments:
    """What a rank is given. It travels over a pipe of multiprocessing's own: not in argv, not in the environment."""

    entry: str
    config: EngineConfig
    rank: int
    epoch: Epoch
    key: bytes = dataclasses.field(repr=False)
    socket_path: Path
    run_dir: Path
    control: InheritedFd
    collective: InheritedFd | None
    stacks: InheritedFd
    parent_pid: int
    parked: bool = False


# ------------------------------------------------------------------------------------- in the child


def run_rank(arguments: RankArguments) -> None:
    """First function of a rank's process: tie it to its parent, connect, then run the entry.

    An exception of the entry travels to the scheduler as data, and the process ends with exit code 1 at once: the
    other ranks may be inside a collective with this one, and waiting for them to leave would hang.
    """
    rank, config = arguments.rank, arguments.config
    processes.ignore_interrupts()
    if not processes.set_death_signal(signal.SIGKILL, arguments.parent_pid):
        os._exit(1)
    processes.name_process(f"nano-{'spare' if arguments.parked else 'worker'}-{rank}")
    processes.configure_logging(config.server.log_level, f"worker rank {rank}", config.server.log_format)
    guard_threads(processes.end_process)
    num_threads = processes.limit_threads(config.parallel.world_size)
    # In C, at once, whatever Python is doing: asked for before a group that hangs is killed (`ask_for_stacks`).
    faulthandler.register(processes.STACK_SIGNAL, arguments.stacks.fd, all_threads=True)

    control = ControlBlock(arguments.control.fd, config.parallel.world_size)
    os.close(arguments.control.fd)
    start_thread(lambda: _beat(control.ranks[rank]), "heartbeat", processes.end_process)

    link = Link(arguments.key, arguments.epoch, rank, end=Direction.TO_RANK)
    await_listener(arguments.socket_path, _LISTEN_SECONDS)
    link.connect(arguments.socket_path)
    link.send(Hello(os.getpid()))
    port = RankPort(
        config, rank, arguments.epoch, link, control,
        run_dir=arguments.run_dir,
        collective_fd=None if arguments.collective is None else arguments.collective.fd,
        num_threads=num_threads,
    )  # fmt: skip
    try:
        port.set_phase(Phase.LOADING)
        if not arguments.parked:
            _start_reading_ahead(config, rank)
        began = time.monotonic()
        entry = resolve(arguments.entry)  # the imports, which take most of a start
        logger.log(logging.DEBUG if rank else logging.INFO, "imported its code in %.2f s", time.monotonic() - began)
        if not arguments.parked or port.await_begin():
            if arguments.parked:
                _start_reading_ahead(config, rank)
            processes.name_process(f"nano-worker-{rank}")
            port.set_phase(Phase.LOADING)
            entry(port)
    except BaseException as error:
        with contextlib.suppress(Exception):
            port.report_failure(to_wire(error), traceback.format_exc())
        _leave(port, 1)
    _leave(port, 0)


def _start_reading_ahead(config: EngineConfig, rank: int) -> None:
    """One rank has the disk bring what all of them are about to read."""
    if rank == 0 and config.model_dir is not None:
        model_dir = Path(config.model_dir)
        start_thread(lambda: read_ahead(model_dir), "read-ahead", nothing_more)


def resolve(entry: str) -> Callable[..., Any]:
    """The function that `module:function` names."""
    module, _, name = entry.partition(":")
    # Imports make objects by the hundred thousand, all of which stay: to look for garbage among them takes 0.2 s.
    collects = gc.isenabled()
    gc.disable()
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    finally:
        if collects:
            gc.enable()
    return function


def _leave(port: RankPort, exit_code: int) -> NoReturn:
    """Flush what was said (the scheduler prefers a rank's own word to an exit code), then end at once.

    Tearing down an interpreter that holds torch takes a good part of the time in which a server should be gone,
    and what has to be left in an orderly way, the group of ranks, has been left.
    """
    port.close()
    zmq.Context.instance().term()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(exit_code)


def _beat(words: RankWords) -> None:
    """Heartbeat, and the tie to the parent where the kernel offers none: the sentinel is a pipe it alone holds."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    while True:
        words.beat()
        if wait_for_sentinels([parent.sentinel], HEARTBEAT_SECONDS):
            os._exit(1)


# --------------------------------------------------------------------------------- in the scheduler


class RankProcess:
    """The scheduler's handle on one rank: its process, its link, and what it has said so far."""

    def __init__(self, arguments: RankArguments, words: RankWords) -> None:
        """`spawn` starts the process, then `listen` lets it connect."""
        self.rank, self.words = arguments.rank, words
        self.loaded: Loaded | None = None
        self.ready = False
        self.failed: Failed | None = None
        self.given_up: GaveUp | None = None  # the last step that it had no memory for
        self._is_connected = self._shall_begin = False
        self._arguments = arguments
        self._stacks_fd = arguments.stacks.fd
        self._process: BaseProcess | None = None
        self.link = Link(arguments.key, arguments.epoch, arguments.rank, end=Direction.TO_SCHEDULER)

    def spawn(self, context: SpawnContext) -> None:
        """Start the process. Runs in a thread that lives as long as the scheduler (see `processes`)."""
        # Not daemonic: a daemonic process may not have children, which a compiler in the rank may want.
        process = context.Process(
            target=run_rank, args=(self._arguments,), name=f"worker rank {self.rank}", daemon=False
        )
        with _without_main():
            process.start()
        self._process = process
        assert process.pid is not None
        processes.register_child(process.pid, process.sentinel)

    def listen(self) -> None:
        """Bind the rank's socket, for its process alone. Raises ConfigError when the path is too long."""
        assert self._process is not None, "spawn() comes first"
        self.link.bind(self._arguments.socket_path, self._process.pid)

    @property
    def sentinel(self) -> int | None:
        """A descriptor that is readable once the process has ended; None before `spawn` and after `reap`."""
        return None if self._process is None else self._process.sentinel

    @property
    def exit_code(self) -> int | None:
        """None while the process lives."""
        return None if self._process is None else self._process.exitcode

    def describe(self) -> str:
        """Name and state, for error messages."""
        state = self.words.describe() if self.exit_code is None else processes.describe_exit(self.exit_code)
        return f"rank {self.rank} ({state})"

    @property
    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP, a debugger) keeps the process from running."""
        return self._process is not None and processes.is_stopped(self._process.pid)

    def ask_for_stacks(self) -> bool:
        """Have the process write where each of its threads stands, and run if it is stopped; for `read_stacks`.

        False when it cannot: it is gone, or has not come so far that it knows the signal.
        """
        if self.exit_code is not None or self._process is None or self.words.phase < Phase.LOADING:
            return False
        assert self._process.pid is not None
        os.kill(self._process.pid, processes.STACK_SIGNAL)
        os.kill(self._process.pid, signal.SIGCONT)
        return True

    def read_stacks(self) -> str:
        """What the process has written by now."""
        return os.pread(self._stacks_fd, _MAX_STACK_BYTES, 0).decode(errors="replace").rstrip()

    def begin(self) -> None:
        """Let a parked rank load the model; one that is still on its way to us is told as soon as it is here.

        Raises DeadlineError when it takes no message.
        """
        self._shall_begin = True
        if self._is_connected:
            self.link.send(Begin())

    def receive(self, ended: bool = False) -> list[StepOutput]:
        """Take in what the rank has said, and return the step outputs. Raises ChannelError on a broken link.

        The last words of one that has `ended` are waited for.
        """
        outputs: list[StepOutput] = []
        patience = 0.0 if not ended else _LAST_WORDS_SECONDS if (self.exit_code or 0) >= 0 else _KILLED_WORDS_SECONDS
        while True:
            message = self.link.receive(0 if self.failed else patience)
            match message:
                case None:
                    return outputs
                case StepOutput():
                    outputs.append(message)
                case Hello():
                    self.link.unlink()
                    self._is_connected = True
                    if self._shall_begin:
                        self.link.send(Begin())
                case Loaded():
                    self.loaded = message
                    logger.info(
                        "rank %d loaded the model as %s on %s, room for %d K/V blocks",
                        self.rank, message.dtype, message.device, message.max_kv_blocks,
                    )  # fmt: skip
                case Ready():
                    self.ready = True
                case Failed():
                    self.failed = message
                case GaveUp():
                    self.given_up = message
                case _:
                    logger.warning("rank %d sent %s, which is not for it to send", self.rank, type(message).__name__)

    def kill(self) -> None:
        """SIGKILL, which also ends a stopped process; does not wait."""
        if self._process is not None:
            self._process.kill()

    def reap(self, timeout: float = _REAP_SECONDS) -> bool:
        """Wait for the end of the process and release all that belongs to it; False if it has not ended."""
        self.link.unlink()
        self.link.close()
        if self._stacks_fd >= 0:
            os.close(self._stacks_fd)
            self._stacks_fd = -1
        if self._process is None:
            return True
        self._process.join(timeout)
        if self._process.exitcode is None:
            return False
        assert self._process.pid is not None
        processes.forget_child(self._process.pid)
        self._process.close()
        self._process = None
        return True


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Hide `__main__` while a process is spawned.

    multiprocessing imports the parent's main module in every child, so that functions defined there can be
    unpickled. Ours are not, and that import would run the scheduler's module, or a user's script, once a rank.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
