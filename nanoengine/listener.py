"""A Unix socket's file that one process alone may connect through; knows nothing of what is said there."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import zmq
from zmq.utils.monitor import recv_monitor_message

from configs.errors import ConfigError, DeadlineError

logger = logging.getLogger(__name__)

MAX_SOCKET_PATH = 107  # sun_path of unix(7) less its final zero
UNFINISHED = ".new"
_POLL_SECONDS = 0.002  # binding follows the start of a process within a millisecond, long before it wants to connect


class Listener:
    """Binds `socket` at `path`, for the process `peer_pid` alone where one is named.

    A PAIR socket has one peer. Whoever came before it, even one that says nothing genuine, would keep it out; so the
    kernel is asked who connects, and what another process sends is never read.
    """

    def __init__(self, socket: zmq.Socket[bytes], path: Path, peer_pid: int | None = None) -> None:
        """Raises ConfigError when the system cannot hold so long a path."""
        self._socket, self._path = socket, path
        self._monitor: zmq.Socket[bytes] | None = None
        self._turned_away = 0
        made = path.with_name(path.name + UNFINISHED)
        check_socket_path(made)
        if peer_pid is not None and sys.platform == "linux":
            socket.setsockopt(zmq.IPC_FILTER_PID, peer_pid)
            self._monitor = socket.get_monitor_socket(zmq.EVENT_ACCEPT_FAILED)
        socket.bind(f"ipc://{made}")
        made.rename(path)  # the name appears once it listens, since the peer tries only once

    @property
    def turned_away(self) -> int:
        """How many connections of other processes there were."""
        monitor = self._monitor
        while monitor is not None and int(monitor.get(zmq.EVENTS)) & int(zmq.POLLIN):
            recv_monitor_message(monitor)
            self._turned_away += 1
        return self._turned_away

    def unlink(self) -> None:
        """Take the file away: nobody connects any more. Connections stay; ZeroMQ's own unbind would end them."""
        self._path.unlink(missing_ok=True)
        if self._monitor is not None:
            if self.turned_away:
                logger.warning("turned away %d connection(s) of another process to %s", self._turned_away, self._path)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None


def await_listener(path: Path, timeout: float) -> None:
    """Wait until somebody listens at `path`. Raises DeadlineError when nobody does within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not path.exists():
        if time.monotonic() > deadline:
            raise DeadlineError(f"nobody listened at {path} within {timeout:g} s")
        time.sleep(_POLL_SECONDS)


def check_socket_path(path: Path) -> None:
    """Raise ConfigError when `path` is too long for a Unix socket."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes, the system allows {MAX_SOCKET_PATH}; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter directory"
        )
