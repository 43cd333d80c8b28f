"""Streams that go on without their reader and can be read again; knows no engine and no shape of an answer.

Who sends `X-Stream-Resume: 1` gets events with ids. Such a stream runs in a task of its own, which keeps the events as
they were sent, so that a later reader gets the same bytes. It is forgotten `stream_resume_seconds` after its reader
left or after its end, whichever comes last.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import hmac
import itertools
import re
from collections.abc import AsyncGenerator
from pathlib import Path

from fastapi import Request

from configs.errors import RequestError
from launch.front_dir import FrontDir
from launch.server.errors import NOT_FOUND, ApiError
from launch.server.events import error_events
from nanoengine.watched import note_death

RESUME_HEADER, LAST_ID_HEADER = "X-Stream-Resume", "Last-Event-ID"
# Of all kept events together. Beyond it ended streams are forgotten, then the oldest events of the largest stream.
MAX_KEPT_BYTES = 64 * 2**20
MAX_STREAMS = 4096
_BATCH = 256

Events = AsyncGenerator[list[bytes], None]


def wants_resume(request: Request, is_stream: bool) -> bool:
    """Whether the client asks for a stream that it can resume. Raises RequestError where it cannot be served."""
    value = request.headers.get(RESUME_HEADER)
    if value not in (None, "0", "1"):
        raise RequestError(f"the header {RESUME_HEADER} must be 0 or 1, got {value!r:.100}", RESUME_HEADER)
    if value == "1" and not is_stream:
        raise RequestError(f"the header {RESUME_HEADER} needs stream: true", RESUME_HEADER)
    return value == "1"


class KeptStream:
    """One stream: its events, whoever reads them, and the task that makes them."""

    def __init__(self, store: StreamStore, stream_id: str, owner: bytes, events: Events) -> None:
        self.stream_id, self.owner = stream_id, owner
        self.done = False
        self.size = 0
        self.has_reader = False
        self._store = store
        self._failure: Exception | None = None  # before there was an event, or of what keeps them
        self._events: collections.deque[bytes] = collections.deque()
        self._first = 0  # the number of the oldest event that is kept
        self._turn = 0  # counts readers; the latest has the stream
        self._news = asyncio.Event()
        self._expiry: asyncio.TimerHandle | None = None
        self._task = asyncio.create_task(self._run(events))
        self._wait_for_reader()

    @property
    def end(self) -> int:
        """The number that the next event will have."""
        return self._first + len(self._events)

    def has(self, number: int) -> bool:
        """Whether it can be read from this event on."""
        return self._first <= number <= self.end

    async def _run(self, events: Events) -> None:
        try:
            await self._keep(events)
        except Exception as error:  # what keeps them failed, or what tells of a failure: nobody must wait for more
            self._failure = error
            note_death(f"the stream {self.stream_id}", error)
        self.done = True
        self._news.set()
        self._wait_for_reader()

    async def _keep(self, events: Events) -> None:
        try:
            async with contextlib.aclosing(events):
                async for batch in events:
                    self._add(batch)
        except Exception as error:
            if not self.end:
                self._failure = error
            else:
                self._add(error_events(error))

    def _add(self, events: list[bytes]) -> None:
        grown = 0
        for event in events:
            numbered = b"id: %s:%d\n%s" % (self.stream_id.encode(), self.end, event)
            self._events.append(numbered)
            grown += len(numbered)
        self.size += grown
        self._news.set()
        self._store.grew(grown)

    def drop_half(self) -> int:
        """Forget the older half of the events, at least one; returns their bytes."""
        dropped = [self._events.popleft() for _ in range((len(self._events) + 1) // 2)]
        self._first += len(dropped)
        size = sum(map(len, dropped))
        self.size -= size
        return size

    async def read(self, number: int) -> Events:
        """The events from a number on, until the end or until another reader takes over."""
        self._turn += 1
        turn = self._turn
        self._news.set()  # the reader before this one leaves
        self.has_reader = True
        try:
            while turn == self._turn:
                if number < self._first:
                    raise _gone(self.stream_id)
                if number < self.end:
                    start = number - self._first
                    batch = list(itertools.islice(self._events, start, start + _BATCH))
                    number += len(batch)
                    yield batch
                elif self.done:
                    if self._failure is not None:
                        self._store.forget(self)  # it has been told; its id may be asked for again at once
                        raise self._failure
                    return
                else:
                    self._news.clear()
                    await self._news.wait()
        finally:
            if turn == self._turn:
                self.has_reader = False
                if not self.done:
                    self._wait_for_reader()
                elif self._expiry is None:  # its time was over while it was read
                    self._store.forget(self)

    def _wait_for_reader(self) -> None:
        """The time until it is forgotten starts, now that its reader has left or that it has ended."""
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_later(self._store.seconds, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        if not self.has_reader:
            self._store.forget(self)

    def close(self) -> None:
        """Stop what makes it and whoever reads it."""
        self._turn += 1
        self._news.set()
        self._task.cancel()
        if self._expiry is not None:
            self._expiry.cancel()


class StreamStore:
    """All streams of this process that can be resumed. `seconds` is how long they stay without a reader.

    `front_dir` tells the other front ends of this server, if there are any, which streams are here.
    """

    def __init__(
        self,
        seconds: float,
        max_bytes: int = MAX_KEPT_BYTES,
        max_streams: int = MAX_STREAMS,
        front_dir: FrontDir | None = None,
    ) -> None:
        self.seconds, self._front_dir = seconds, front_dir
        self._max_bytes, self._max_streams = max_bytes, max_streams
        self._streams: dict[str, KeptStream] = {}
        self._size = 0  # of all their events

    def __len__(self) -> int:
        return len(self._streams)

    def start(self, request: Request, stream_id: str, events: Events) -> KeptStream:
        """Keep a new stream, for whoever sends the same key.

        Raises:
            ApiError: 409 when there is one of this id, 429 when there are too many.
        """
        if stream_id in self._streams:
            raise _exists(stream_id)
        if len(self._streams) >= self._max_streams and not self._forget_ended():
            message = f"at most {self._max_streams} streams can be resumed at a time; try again later"
            raise ApiError(429, message, "rate_limit_error", code="too_many_streams")
        if self._front_dir is not None and not self._front_dir.claim(stream_id):
            raise _exists(stream_id)
        stream = self._streams[stream_id] = KeptStream(self, stream_id, _owner(request), events)
        return stream

    def find(self, request: Request, stream_id: str) -> KeptStream:
        """The stream of this id. Raises ApiError 404 when there is none (any more), or it is another key's."""
        stream = self._streams.get(stream_id)
        if stream is None or not hmac.compare_digest(stream.owner, _owner(request)):
            raise _gone(stream_id)
        return stream

    def elsewhere(self, stream_id: str) -> Path | None:
        """The socket of another front end that keeps this stream; None when there is none."""
        return None if self._front_dir is None else self._front_dir.elsewhere(stream_id)

    def grew(self, num_bytes: int) -> None:
        """Count further events, and keep all of them within their bound."""
        self._size += num_bytes
        while self._size > self._max_bytes:
            if not self._forget_ended():
                self._size -= max(self._streams.values(), key=lambda stream: stream.size).drop_half()

    def _forget_ended(self) -> bool:
        ended = next((each for each in self._streams.values() if each.done and not each.has_reader), None)
        if ended is not None:
            self.forget(ended)
        return ended is not None

    def forget(self, stream: KeptStream) -> None:
        """Drop a stream; what still runs of it is aborted. Harmless twice."""
        if self._streams.get(stream.stream_id) is stream:
            del self._streams[stream.stream_id]
            if self._front_dir is not None:
                self._front_dir.release(stream.stream_id)
            self._size -= stream.size
        stream.close()


def next_number(request: Request, stream: KeptStream, last_event_id: str | None) -> int:
    """The number of the event behind the one that the client names, in the header or the query; 0 if it names none.

    Raises:
        RequestError: it is no event of this stream.
        ApiError: 404 when the events behind it are forgotten.
    """
    given = request.headers.get(LAST_ID_HEADER) or last_event_id
    if not given:
        number = 0
    else:
        match = re.fullmatch(re.escape(stream.stream_id) + r":(\d{1,9})", given, re.ASCII)
        if match is None or int(match[1]) >= stream.end:
            raise RequestError(
                f"{LAST_ID_HEADER} must be the id of an event of the stream {stream.stream_id}, got {given!r:.200}",
                LAST_ID_HEADER,
            )
        number = int(match[1]) + 1
    if not stream.has(number):
        raise _gone(stream.stream_id)
    return number


def _owner(request: Request) -> bytes:
    return hashlib.blake2b(request.headers.get("authorization", "").encode(), digest_size=16).digest()


def _gone(stream_id: str) -> ApiError:
    message = f"there is no stream {stream_id:.200}, or these events of it are kept no longer"
    return ApiError(404, message, NOT_FOUND, code="stream_not_found")


def keeper_gone(stream_id: str) -> ApiError:
    """The 404 for a stream of a front end that has died."""
    message = f"the front end that kept the stream {stream_id:.200} has died, and the stream with it"
    return ApiError(404, message, NOT_FOUND, code="stream_not_found")


def _exists(stream_id: str) -> ApiError:
    return ApiError(409, f"there is a stream {stream_id} already", code="stream_exists")
