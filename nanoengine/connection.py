"""Carries messages between an EngineClient and the scheduler's socket without ever blocking; knows no request.

Sends wait in the client's outbox while the socket takes no more, so a slow scheduler costs memory, not time.
"""

from __future__ import annotations

import logging
import math
import time

import zmq

from configs.errors import ChannelError, EngineError
from nanoengine.engine_client import EngineClient
from nanoengine.journal import RequestJournal
from nanoengine.messages import MAX_MESSAGE_BYTES, Message, decode, encode

logger = logging.getLogger(__name__)

HIGH_WATER_MARK = 1000  # messages queued in either direction before the sender has to wait
# What one call of `pump` takes at most, so that an event loop gets its turn: messages, and seconds for them.
MAX_BATCH = 100
MAX_SECONDS = 0.004
# After so many messages in a row that could not be taken in, nothing is hoped for any more.
MAX_LOST = 20


class SchedulerConnection:
    """A DEALER socket to the ROUTER at `address`, whose identity is the client's id."""

    def __init__(self, address: str, client: EngineClient) -> None:
        self._client = client
        self._failed: list[RequestJournal] = []  # what could not be sent, until `pump` tells of it
        self._num_lost = 0  # messages in a row
        # Context.instance() is the one Context of this process, and a new one after a fork.
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, client.client_id.encode())
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self._socket.connect(address)

    def fileno(self) -> int:
        """Readable when the socket's state changed; edge-triggered, so `pump` until it says that it is done."""
        return int(self._socket.getsockopt(zmq.FD))

    def pump(self) -> tuple[list[RequestJournal], bool]:
        """Send and receive what can be without waiting.

        Returns the requests that have news, each once, and whether more may be waiting (call again, perhaps after
        others had their turn). A malformed message ends the engine for this client: nothing behind it can be
        trusted.
        """
        updated: dict[RequestJournal, None] = {}
        deadline = time.perf_counter() + MAX_SECONDS
        for number in range(MAX_BATCH):
            if number and time.perf_counter() > deadline:
                break
            try:
                self.flush()
                updated |= dict.fromkeys(self._failed)
                self._failed.clear()
                message = self._receive()
                if message is None:
                    # Looking at one direction swallows the wake-up of the other, so ask before going to sleep.
                    if self._is_ready():
                        continue
                    return list(updated), False
                updated |= dict.fromkeys(self._client.handle(message))
                self._num_lost = 0
            except ChannelError as error:
                updated |= dict.fromkeys(self._client.fail(error))
            except Exception as error:
                updated |= dict.fromkeys(self._ask_again(error))
        return list(updated), True

    def _ask_again(self, error: Exception) -> list[RequestJournal]:
        """A message was lost on this side, whatever it said: the scheduler is to say it again."""
        logger.exception("a message of the scheduler was lost")
        self._num_lost += 1
        if self._num_lost > MAX_LOST:
            return self._client.fail(EngineError(f"the front end failed: {type(error).__name__}: {error}"))
        self._client.hello()
        self._client.outbox.extend(self._client.resubmit_all())
        return []

    def flush(self) -> None:
        """Send what the socket takes; the rest stays in the outbox for `pump`."""
        outbox = self._client.outbox
        while outbox:
            try:
                frame = encode(outbox[0])
            except ChannelError as error:
                # It would stay in front of what everybody else has to say.
                self._failed += self._client.drop_unsendable(outbox.popleft(), error)
                continue
            try:
                self._socket.send(frame, zmq.DONTWAIT)
            except zmq.Again:
                return
            outbox.popleft()

    def wait(self, timeout: float, other_fd: int) -> bool:
        """Block for up to `timeout` seconds until `pump` has something to do; says whether `other_fd` is readable."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if self._client.outbox else 0))
        poller.register(other_fd, zmq.POLLIN)
        return any(source == other_fd for source, _ in poller.poll(math.ceil(timeout * 1000)))

    def close(self) -> None:
        """Drop the connection and what was not sent. Harmless twice."""
        self._socket.close(linger=0)

    def _receive(self) -> Message | None:
        try:
            return decode(self._socket.recv(zmq.DONTWAIT))
        except zmq.Again:
            return None

    def _is_ready(self) -> bool:
        wanted = zmq.POLLIN | (zmq.POLLOUT if self._client.outbox else 0)
        return bool(int(self._socket.getsockopt(zmq.EVENTS)) & wanted)
