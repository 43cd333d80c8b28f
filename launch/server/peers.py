"""Asks the other front ends of this server, over their private sockets; knows no stream and no engine.

Whoever is asked checks the client's key like any other request's, so it is passed on. What comes from a peer is neither
counted nor logged: the front end that the client asked does that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from launch.client.connection import ClientError, HttpClient
from launch.front_dir import FrontDir
from launch.server.errors import UNAVAILABLE, ApiError
from launch.server.waiting import cancelled, either, hang_up

# One that does not answer in this time hangs. A stream's status may wait for its first event.
ASK_SECONDS = 2.0
RELAY_SECONDS = 10.0
_MAX_ANSWER_BYTES = 2**16
_PASSED_ON = ("authorization", "last-event-id")
_PASSED_BACK = ("content-type", "content-length", "cache-control", "x-accel-buffering", "x-stream-id", "retry-after")


def is_from_peer(scope: Scope) -> bool:
    """Whether another front end asks: only they reach the private socket, which has no port."""
    server = scope.get("server")
    return server is None or (server[1] is None and server[0].startswith("/"))


async def ask_others(request: Request, front_dir: FrontDir) -> list[dict[str, Any]]:
    """What each of the other front ends answers to the same request, those left out that have died.

    Raises ApiError 503 when one does not answer.
    """

    async def ask(path: Path) -> dict[str, Any] | None:
        client = _client(request, path)
        try:
            async with asyncio.timeout(ASK_SECONDS), client.request("GET", _target(request)) as answer:
                body = await answer.read(_MAX_ANSWER_BYTES)
            found: dict[str, Any] = json.loads(body)
            return found if answer.status == 200 else None
        except ClientError:
            return None
        except TimeoutError:
            raise _silent(path, ASK_SECONDS) from None
        finally:
            client.close()

    answers = await asyncio.gather(*map(ask, front_dir.others()))
    return [each for each in answers if each is not None]


class Relayed(Response):
    """What the front end behind a socket answers to the same request, passed on as it comes.

    The client's hanging up is passed on, and a slow client slows the other front end down. `gone` is the answer when
    that one has died.
    """

    def __init__(self, request: Request, path: Path, gone: ApiError) -> None:
        super().__init__()
        self._request, self._path, self._gone = request, path, gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        client = _client(self._request, self._path)
        leaving = asyncio.ensure_future(hang_up(receive))
        relaying = asyncio.create_task(self._relay(client, scope, receive, send))
        try:
            await either(relaying, leaving)
            (relaying if relaying.done() else leaving).result()
        finally:
            await cancelled(relaying, leaving)
            client.close()

    async def _relay(self, client: HttpClient, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(RELAY_SECONDS):
                    answer = await stack.enter_async_context(client.request("GET", _target(self._request)))
            except ClientError:
                await self._gone.response()(scope, receive, send)
                return
            except TimeoutError:
                await _silent(self._path, RELAY_SECONDS).response()(scope, receive, send)
                return
            headers = _only(answer.headers, _PASSED_BACK)
            raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": answer.status, "headers": raw})
            # If it dies now, the answer breaks off, as it does for the clients that it serves itself.
            async for piece in answer.pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _client(request: Request, path: Path) -> HttpClient:
    headers = _only(request.headers, _PASSED_ON) | {"x-request-id": request.state.request_id}
    return HttpClient("http://front-end", headers, unix_path=path)


def _only(headers: Mapping[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: headers[name] for name in names if name in headers}


def _target(request: Request) -> str:
    raw: bytes = request.scope["raw_path"]
    query: bytes = request.scope["query_string"]
    return (raw + (b"?" + query if query else b"")).decode("latin-1")


def _silent(path: Path, seconds: float) -> ApiError:
    message = f"the front end {path.stem} of this server has not answered within {seconds:g} s"
    return ApiError(503, message, UNAVAILABLE, code="front_end_silent")
