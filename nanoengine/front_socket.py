"""The scheduler's end of the socket to its front ends: typed messages in, merged deltas out; knows no scheduling.

A front end that is slow has its deltas merged until it takes them: they are never dropped and never waited for.
One that has vanished is reported, so that its requests can be aborted.
"""

from __future__ import annotations

import collections
import errno
import logging
from collections.abc import Iterable, Iterator, Sequence

import zmq

from configs.errors import ChannelError
from nanoengine.limited_log import LimitedLog
from nanoengine.messages import (
    MAX_MESSAGE_BYTES,
    Deltas,
    Message,
    Resubmit,
    Stats,
    TokenColumns,
    TokenDelta,
    decode_from_front,
    encode,
    spelt_out,
)
from nanoengine.outbox import ClientDeltas

logger = logging.getLogger(__name__)

# Messages that wait in the socket for one slow front end before deltas are merged on our side.
HIGH_WATER_MARK = 1000


class FrontSocket:
    """A ROUTER bound at `address`; a front end is known by the identity of its DEALER, which is its client id.

    Attributes:
        rejected: how many messages were refused, by reason.
    """

    def __init__(self, address: str, incarnation: int) -> None:
        self.incarnation = incarnation
        self.rejected: collections.Counter[str] = collections.Counter()
        self._log = LimitedLog(logger)
        self._pending: dict[str, list[TokenDelta | TokenColumns]] = {}
        self._stats: dict[str, Stats] = {}
        self._to_ask: set[str] = set()  # to resubmit, once they have taken what waits for them
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A front end that connects again takes over its own identity instead of being turned away.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.bind(address)

    def receive(self) -> Iterator[tuple[str, Message]]:
        """What has arrived, one (client id, message) after the other; never waits. What is malformed is counted.

        What is not asked for any more, is there the next time.
        """
        for _ in range(HIGH_WATER_MARK):
            try:
                identity, frame = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            except ValueError:
                self.reject("parts", "a front end sent a message of the wrong number of parts")
                continue
            client_id = identity.decode(errors="replace")
            try:
                message = decode_from_front(frame)
            except ChannelError as error:
                self.reject("malformed", f"front end {client_id!r:.100}: {error.message:.300}")
                continue
            yield client_id, message

    def reject(self, reason: str, text: str) -> None:
        """Count a message that is refused, and log it, within bounds."""
        self.rejected[reason] += 1
        self._log.warning(text)

    def send(self, client_id: str, message: Message) -> bool:
        """Send a message that is not a delta; says whether the front end is still there. A full queue drops it."""
        return self._send(client_id, message) is not None

    def offer(self, client_id: str, message: Message) -> bool:
        """Send a message that must not get lost; False when the queue is full, and it is to be offered again."""
        return self._send(client_id, message) is not False

    def post(self, deltas: ClientDeltas) -> None:
        """Queue deltas for `flush`."""
        for client_id, entry in deltas.entries:
            self._pending.setdefault(client_id, []).append(entry)

    def post_stats(self, client_ids: Iterable[str], stats: Stats) -> None:
        """Queue statistics for `flush`; who has not taken the last ones yet gets these alone."""
        self._stats |= dict.fromkeys(client_ids, stats)

    def post_resubmit(self, client_ids: Iterable[str]) -> None:
        """Queue the word to resubmit for `flush`, behind the deltas that were posted."""
        self._to_ask.update(client_ids)

    @property
    def has_pending(self) -> bool:
        """Whether a front end has yet to take something."""
        return bool(self._pending or self._stats or self._to_ask)

    def flush(self) -> list[str]:
        """Send each front end its deltas in one message, then the rest; returns the ids of those that vanished."""
        vanished = []
        for client_id, deltas in list(self._pending.items()):
            sent = self._send(client_id, Deltas(self.incarnation, deltas))
            if sent is None:
                vanished.append(client_id)
            if sent is not False:
                del self._pending[client_id]
            else:
                self._pending[client_id] = [*merge(deltas)]
        for client_id in sorted(self._to_ask - self._pending.keys()):
            sent = None if client_id in vanished else self._send(client_id, Resubmit(self.incarnation))
            if sent is not False:
                self._to_ask.remove(client_id)
            if sent is None and client_id not in vanished:
                vanished.append(client_id)
        for client_id, stats in list(self._stats.items()):
            sent = None if client_id in vanished else self._send(client_id, stats)
            if sent is not False:
                del self._stats[client_id]
            if sent is None and client_id not in vanished:
                vanished.append(client_id)
        return vanished

    def _send(self, client_id: str, message: Message) -> bool | None:
        """True: sent; False: its queue is full, or there is no memory just now; None: it has vanished."""
        try:
            self.socket.send_multipart([client_id.encode(), encode(message)], zmq.NOBLOCK)
            return True
        except (zmq.Again, MemoryError):
            return False
        except zmq.ZMQError as error:
            if error.errno == errno.ENOMEM:
                return False
            if error.errno != errno.EHOSTUNREACH:
                raise
            return None

    def close(self, linger_ms: int = 0) -> None:
        """Close the socket; what is not sent within `linger_ms` is dropped."""
        self.socket.close(linger_ms)


def merge(deltas: Sequence[TokenDelta | TokenColumns]) -> list[TokenDelta]:
    """Join deltas of the same sequence that follow each other; the order of sequences is kept."""
    joined: dict[tuple[str, int], TokenDelta] = {}
    merged: list[TokenDelta] = []
    for delta in spelt_out(deltas):
        key = (delta.request_id, delta.index)
        last = joined.get(key)
        if last is None or last.finish_reason or not _follows(delta, last):
            joined[key] = delta
            merged.append(delta)
            continue
        last.token_ids = last.token_ids + delta.token_ids
        if last.logprobs is not None and delta.logprobs is not None:
            last.logprobs = last.logprobs + delta.logprobs
        if last.prompt_logprobs is None:
            last.prompt_logprobs = delta.prompt_logprobs
        elif delta.prompt_logprobs is not None:
            last.prompt_logprobs = last.prompt_logprobs.joined(delta.prompt_logprobs)
        last.finish_reason, last.stop_reason = delta.finish_reason, delta.stop_reason
        last.error, last.metrics = delta.error, delta.metrics or last.metrics
    return merged


def _follows(delta: TokenDelta, last: TokenDelta) -> bool:
    told, more = last.prompt_logprobs, delta.prompt_logprobs
    return last.start + len(last.token_ids) == delta.start and (told is None or more is None or told.end == more.start)
