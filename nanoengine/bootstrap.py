"""The first moments of the scheduler process: what its owner hands down, and what ties it to its owner.

It knows nothing of what the scheduler does afterwards. The other side is `nanoengine.engine_process`.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from configs.engine import EngineConfig
from configs.errors import to_wire
from nanoengine import processes
from nanoengine.spawning import read_message
from nanoengine.watched import guard_threads

_OWNER_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """What the owner hands to the scheduler, and how the scheduler answers."""

    config: EngineConfig
    run_dir: Path
    front_address: str
    incarnation: int
    status_fd: int = dataclasses.field(repr=False)

    def report_ready(self) -> None:
        """Tell the owner that the engine serves."""
        self._report({"ready": True})

    def report_progress(self) -> None:
        """Tell the owner that this scheduler has brought a token: another one in its place would not be in vain."""
        self._report({"progress": True})

    def report_failure(self, error: BaseException, *, is_final: bool = False) -> None:
        """Tell the owner why this process ends, with a code other than 0 afterwards.

        `is_final` says that another scheduler would fare no better. From here on SIGTERM is ignored: the owner, who may
        send it now, must not disturb the exit that is under way.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._report({"error": to_wire(error), "is_final": is_final})

    def _report(self, report: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # the owner is gone: the watchdog deals with that
            os.write(self.status_fd, json.dumps(report).encode() + b"\n")


def receive_bootstrap() -> Bootstrap:
    """Called first thing in the scheduler's `main`; ties the process to its owner.

    It ignores SIGINT (the owner decides what Ctrl-C means), makes SIGTERM raise SystemExit in the main thread
    (install another handler afterwards if you like), asks for SIGTERM when the owner dies, and starts the thread
    that, when the owner is gone, kills the workers, removes the engine's directory and ends the process. SIGUSR1 has
    it write where its threads stand.

    Raises:
        SystemExit: not started by `EngineProcess`.
    """
    processes.ignore_interrupts()
    signal.signal(signal.SIGTERM, _terminate)
    processes.name_process("nano-scheduler")
    message = read_message("The scheduler")
    run_dir, engine_dir = Path(message["run_dir"]), Path(message["engine_dir"])
    owner_pid: int = message["owner_pid"]
    for name in ("death_fd", "status_fd", "lock_fd"):
        os.set_inheritable(message[name], False)  # none of them is for the ranks

    asked_to_end = threading.Event()  # by the owner, who tidies up behind us, unless it dies meanwhile

    def owner_lives(until_asked: bool) -> bool:
        # Its death is seen a moment after its signs, the pipe's end or SIGTERM: its threads end one by one.
        deadline = time.monotonic() + _OWNER_SECONDS
        while os.getppid() == owner_pid and time.monotonic() < deadline:
            if until_asked and asked_to_end.is_set():
                break
            time.sleep(0.01)
        return os.getppid() == owner_pid

    def abandon() -> None:
        processes.kill_children()
        shutil.rmtree(run_dir, ignore_errors=True)
        if not asked_to_end.is_set() or not owner_lives(until_asked=False):
            shutil.rmtree(engine_dir, ignore_errors=True)
        os._exit(1)

    def tidy() -> None:
        shutil.rmtree(run_dir if owner_lives(until_asked=True) else engine_dir, ignore_errors=True)

    processes.on_end_of(message["death_fd"], abandon, "death pipe", asked_to_end.set)
    atexit.register(tidy)
    if not processes.set_death_signal(signal.SIGTERM, owner_pid):
        abandon()
    config = EngineConfig.from_dict(message["config"])
    processes.configure_logging(config.server.log_level, "scheduler", config.server.log_format)
    guard_threads(processes.end_process)
    if sys.stderr is not None:
        faulthandler.register(processes.STACK_SIGNAL, all_threads=True)
    return Bootstrap(
        config=config,
        run_dir=run_dir,
        front_address=message["front_address"],
        incarnation=message["incarnation"],
        status_fd=message["status_fd"],
    )


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the cleaning up
    sys.exit(0)
