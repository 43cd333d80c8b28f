"""A bare ZeroMQ ping between processes, the yardstick of `control-plane`: no frames, no parsing, no engine.

The pattern is a step's: one message to each peer, one answer from the first; every wait is ZeroMQ's own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from types import TracebackType

import zmq

from nanoengine import processes

_SIZE_BYTES = 4  # the head of a message says how many bytes to answer; an empty message ends the peer
_DEADLINE_MS = 10_000


class BarePing:
    """`num_peers` processes that answer. Use it as a context; its sockets lie in `directory`."""

    def __init__(self, num_peers: int, directory: Path) -> None:
        self._sockets: list[zmq.Socket[bytes]] = []
        self._peers = []
        context = multiprocessing.get_context("spawn")
        for number in range(num_peers):
            address = f"ipc://{directory}/ping{number}"
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, _DEADLINE_MS)
            socket.bind(address)
            self._sockets.append(socket)
            peer = context.Process(target=_answer, args=(address, os.getpid()), daemon=True)
            peer.start()
            self._peers.append(peer)

    def ping(self, num_bytes: int, num_answer_bytes: int) -> None:
        """Send `num_bytes` to each peer and wait for `num_answer_bytes` from the first (and none from the others)."""
        filling = bytes(max(0, num_bytes - _SIZE_BYTES))
        for number, socket in enumerate(self._sockets):
            asked = 0 if number else num_answer_bytes
            socket.send(asked.to_bytes(_SIZE_BYTES, "little") + filling)
        answer = self._sockets[0].recv()
        assert len(answer) == num_answer_bytes

    def __enter__(self) -> BarePing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for socket, peer in zip(self._sockets, self._peers, strict=True):
            with contextlib.suppress(zmq.Again):  # it is gone, or has not come yet
                socket.send(b"", zmq.NOBLOCK)
                peer.join(_DEADLINE_MS / 1000)
            peer.kill()
            peer.join()
            socket.close(linger=0)


def _answer(address: str, parent_pid: int) -> None:
    processes.ignore_interrupts()  # Ctrl-C ends the measurement, which ends this
    if not processes.set_death_signal(signal.SIGKILL, parent_pid):
        return
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.connect(address)
    while message := socket.recv():
        if asked := int.from_bytes(message[:_SIZE_BYTES], "little"):
            socket.send(bytes(asked))
    socket.close(linger=0)
