"""Starts, watches and ends the scheduler process (owner's side), and receives what it needs (child's side).

It knows neither requests nor ranks: what the scheduler does is in `nanoengine.engine`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from configs.engine import EngineConfig
from configs.errors import NanoEngineError

ENGINE_MODULE = "nanoengine.engine"


class EngineProcess:
    """One scheduler process with its private run directory. Usable once; a restart is a new object.

    `wait_ready` may run in another thread than `stop`; everything else belongs to one thread.
    """

    def __init__(self, config: EngineConfig, incarnation: int = 1, module: str = ENGINE_MODULE) -> None:
        raise NotImplementedError

    @property
    def address(self) -> str:
        """`ipc://` address of the scheduler's ROUTER for front ends; known after `start`."""
        raise NotImplementedError

    def start(self) -> None:
        """Make the run directory (after sweeping stale ones) and spawn the scheduler; does not wait for it."""
        raise NotImplementedError

    def wait_ready(self, timeout: float | None = None) -> None:
        """Return once the scheduler reports ready.

        Raises:
            NanoEngineError: what the scheduler reported, typed as there (ConfigError, CheckpointError ...).
            EngineDeadError: it died without a word; gives the exit code or signal.
            DeadlineError: not ready within `timeout` seconds (None: as long as the process lives).
        """
        raise NotImplementedError

    def failure(self) -> NanoEngineError | None:
        """None while the process lives, else why it ended. Never blocks."""
        raise NotImplementedError

    def fileno(self) -> int:
        """A descriptor that is readable once something happened to the process; then ask `failure`."""
        raise NotImplementedError

    def stop(self, timeout: float = 3.0) -> None:
        """End the process within `timeout` seconds (SIGTERM, then SIGKILL) and remove the run directory.

        Harmless twice, from `atexit`, while the scheduler is still loading, and in a forked child (which owns
        nothing).
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Bootstrap:
    """What the owner hands to the scheduler, and how the scheduler answers."""

    config: EngineConfig
    run_dir: Path
    front_address: str
    incarnation: int

    def report_ready(self) -> None:
        """Tell the owner that the engine serves."""
        raise NotImplementedError

    def report_failure(self, error: BaseException) -> None:
        """Tell the owner why the engine ends; the process should exit with a code other than 0 afterwards."""
        raise NotImplementedError


def receive_bootstrap() -> Bootstrap:
    """Called first thing in the scheduler's `main`.

    Ignores SIGINT (the owner decides what Ctrl-C means), makes SIGTERM raise SystemExit (install another handler
    afterwards if you like), asks for SIGTERM when the owner dies, and starts the thread that, when the owner is
    gone, kills the workers, removes the run directory and exits.
    """
    raise NotImplementedError
