"""A server that answers each request with bytes a test has written down, pieces and pauses included."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

MODELS = {"object": "list", "data": [{"id": "first"}, {"id": "second"}]}


class Hangup(Exception):
    """Raised by a script that ends the connection here."""


def json_answer(body: object, status: str = "200 OK") -> bytes:
    """A whole answer of JSON."""
    data = json.dumps(body).encode()
    return b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        status.encode(),
        len(data),
        data,
    )


def stream_head() -> bytes:
    """The head of a stream of events."""
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def piece(data: bytes) -> bytes:
    """One piece of a chunked body; an empty one ends it."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(data: object) -> bytes:
    """One event, as a piece of its own."""
    text = data if isinstance(data, str) else json.dumps(data)
    return piece(f"data: {text}\n\n".encode())


def streamed(*events: object) -> list[bytes]:
    """A whole stream of these events, [DONE] included."""
    return [stream_head(), *(event(each) for each in events), event("[DONE]") + piece(b"")]


def tokens(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    """A completion's chunk."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], "usage": None}


def usage(prompt: int, completion: int) -> dict[str, Any]:
    """The chunk that counts."""
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


class ScriptedServer:
    """`script(number, path, body)` gives the bytes that answer the request of that number, counted from 0.

    Numbers between the pieces are seconds to wait. `bodies` and `paths` hold what was asked, `connections` how many
    were made.
    """

    def __init__(self, script: Callable[[int, str, Any], bytes | Iterable[bytes | float]]) -> None:
        self._script = script
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.heads: list[str] = []
        self.connections = 0
        self._tasks: list[asyncio.Task[None]] = []

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Listen; gives the address."""
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.append(task)
        with contextlib.suppress(asyncio.CancelledError):  # at the end of the test
            await self._answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, Hangup):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lines = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:] if line)
                body = await reader.readexactly(int(lines.get("content-length", 0)))
                number = len(self.bodies)
                self.heads.append(head)
                self.paths.append(head.split(" ")[1])
                self.bodies.append(json.loads(body) if body else None)
                answer = self._script(number, self.paths[-1], self.bodies[-1])
                for part in [answer] if isinstance(answer, bytes) else answer:
                    if isinstance(part, bytes):
                        writer.write(part)
                        await writer.drain()
                    else:
                        await asyncio.sleep(part)
