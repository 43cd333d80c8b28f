"""Starts a module of ours as a child that gets its settings through a pipe: both ends; knows no child in particular.

Nothing of a setting stands on a command line or in the environment, where other processes could read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from configs.errors import EngineError
from nanoengine._packages import child_environment
from nanoengine.processes import in_lasting_thread

_MAX_BYTES = 2**20


def spawn_module(
    module: str, message: dict[str, Any], fds: Sequence[int], keep: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    """Start `python -m module`, which gets `message` by `read_message` and inherits `fds` under their numbers.

    `keep` is called with the process, in the thread that spawned it: were the caller interrupted now, somebody would
    still know of the process. It stays in our process group, so that Ctrl-Z stops and fg continues it with us.

    Raises:
        EngineError: the message does not fit into a pipe.
    """
    read_fd, write_fd = os.pipe()
    try:
        # Written before there is a reader: it fits into the pipe, and nobody can be waited for in vain.
        os.set_blocking(write_fd, False)
        with contextlib.closing(os.fdopen(write_fd, "wb", buffering=0)) as pipe:
            data = json.dumps(message).encode()
            if pipe.write(data) != len(data):
                raise EngineError(f"a configuration of {len(data)} bytes does not fit into a pipe")
        arguments = [sys.executable, "-m", module, f"--bootstrap-fd={read_fd}"]

        def spawn() -> None:
            keep(
                subprocess.Popen(arguments, env=child_environment(), stdin=subprocess.DEVNULL, pass_fds=[read_fd, *fds])
            )

        in_lasting_thread(spawn)
    finally:
        os.close(read_fd)


def read_message(what: str) -> dict[str, Any]:
    """The message of `spawn_module`, in the child; `what` says in the help text what this program is.

    Raises:
        SystemExit: not started by `spawn_module`.
    """
    parser = argparse.ArgumentParser(description=f"{what} of nanoengine; `python -m launch` starts it.")
    parser.add_argument("--bootstrap-fd", type=int, required=True, help="pipe with configuration, set by the owner")
    fd = parser.parse_args().bootstrap_fd
    try:
        with os.fdopen(fd, "rb") as pipe:
            message: dict[str, Any] = json.loads(pipe.read(_MAX_BYTES))  # complete before this process was spawned
            return message
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: no configuration at descriptor {fd} ({error})\n")
