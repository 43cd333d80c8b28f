"""Server-sent events: how a chunk, an error, the end and a sign of life look, and the response that sends them.

It knows ASGI, and neither engine nor answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from launch.server.errors import from_exception
from launch.server.waiting import cancelled, closed
from nanoengine.logs import current_request_id

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
# A comment, which clients skip: it keeps proxies from closing a stream that is silent for long.
PING = b": ping\n\n"
# Where events have ids, some clients (openai 3.52) take any blank line for the end of an event, so this has none: the
# comment stands at the head of the event that comes next.
PING_AMONG_IDS = b": ping\n"
PING_SECONDS = 15.0
# Names a stream that can be resumed before its first event does.
STREAM_ID_HEADER = "X-Stream-Id"


def event(data: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_events(error: Exception) -> list[bytes]:
    """The end of a stream that fails after its status was sent."""
    shown = from_exception(error)
    if shown.status == 500:
        logger.error("the stream of request %s failed", current_request_id.get(), exc_info=error)
    return [event(shown.body()), DONE]


class EventStream(Response):
    """A response that sends events until they end or the client hangs up, and then closes their source.

    `first` is the first batch of events, which is awaited already. What fails is sent as an event. `stream_id` names a
    stream whose events have ids.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        first: asyncio.Future[list[bytes]],
        events: AsyncGenerator[list[bytes], None],
        hang_up: asyncio.Future[None],
        stream_id: str | None,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        if stream_id is not None:
            self.headers[STREAM_ID_HEADER] = stream_id
        self._ping_body = PING if stream_id is None else PING_AMONG_IDS
        self._first, self._events, self._hang_up = first, events, hang_up
        self._sent_at = 0.0  # when something was sent last, in the loop's time
        self._is_sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent_at = asyncio.get_running_loop().time()
        sender, pinger = asyncio.create_task(self._send_all(send)), asyncio.create_task(self._ping(send))
        try:
            # None of them may end by an exception unnoticed: that breaks off the connection, and is logged.
            ended, _ = await asyncio.wait([sender, pinger, self._hang_up], return_when=asyncio.FIRST_COMPLETED)
            for each in ended:
                each.result()
        finally:
            await cancelled(pinger)
            await cancelled(sender)
            await closed(self._events, self._first, self._hang_up)

    async def _send_all(self, send: Send) -> None:
        try:
            await self._send(send, b"".join(await self._first))
            async for batch in self._events:
                await self._send(send, b"".join(batch))
        except Exception as error:  # the status is long gone, so the error becomes an event
            await self._send(send, b"".join(error_events(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        # Waits while the client reads slowly; the outputs merge meanwhile.
        self._is_sending = True
        await send({"type": "http.response.body", "body": body, "more_body": True})
        self._is_sending = False
        self._sent_at = asyncio.get_running_loop().time()

    async def _ping(self, send: Send) -> None:
        loop = asyncio.get_running_loop()
        while True:
            left = self._sent_at + PING_SECONDS - loop.time()
            if left > 0:
                await asyncio.sleep(left)
            elif self._is_sending:  # the client does not even read what is there
                await asyncio.sleep(PING_SECONDS)
            else:
                await self._send(send, self._ping_body)
