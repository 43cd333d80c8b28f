"""What every request passes before a route sees it: its key, its headers' and body's size; knows no route's meaning.

Plain ASGI: nothing is buffered and a stream passes untouched.
"""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.keys import ApiKeys
from launch.server.errors import AUTHENTICATION, ApiError

MAX_BODY_BYTES = 8 * 2**20
MAX_HEADER_BYTES = 32 * 2**10
# A body that takes longer than this to arrive holds a connection for nothing.
BODY_SECONDS = 60.0
# The page holds no data and asks for the key; its files lie under the prefix.
OPEN_PATHS = frozenset({"/livez", "/"})
OPEN_PREFIXES: tuple[str, ...] = ("/static/",)


class ApiKeyGuard:
    """Refuses what does not carry one of the keys, on every path that is not open."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _is_open(scope) or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401, "send one of the server's keys as `Authorization: Bearer KEY`", AUTHENTICATION, code="invalid_api_key"
        )
        await error.response()(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return self._keys.accept(key.strip()) and scheme.lower() == b"bearer"


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(OPEN_PREFIXES))


class HeaderLimit:
    """Refuses headers of more than `MAX_HEADER_BYTES` in all; what is still arriving is the protocol's to bound."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = sum(len(name) + len(value) for name, value in scope.get("headers", ()))
        if size <= MAX_HEADER_BYTES:
            await self._app(scope, receive, send)
            return
        message = f"the headers must be at most {MAX_HEADER_BYTES} bytes, got {size}"
        await ApiError(431, message, code="headers_too_large").response()(scope, receive, send)


class BodyLimit:
    """Refuses a body larger than `MAX_BODY_BYTES`, whether its length is announced or not, and one that trickles in."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES, seconds: float | None = None) -> None:
        self._app, self._limit, self._seconds = app, limit, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        message = f"the body must be at most {self._limit} bytes"
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if announced.isdigit() and int(announced) > self._limit:
            await ApiError(413, f"{message}, got {int(announced)}", code="body_too_large").response()(
                scope, receive, send
            )
            return
        seconds = BODY_SECONDS if self._seconds is None else self._seconds
        deadline = asyncio.get_running_loop().time() + seconds
        received, is_complete = 0, False

        async def bounded() -> Message:
            nonlocal received, is_complete
            if is_complete:  # whoever waits now waits for the client's hanging up
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message_in = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"the body must arrive within {seconds:g} s", {"Connection": "close"}
                ) from None
            is_complete = not message_in.get("more_body")
            received += len(message_in.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, message, {"Connection": "close"})
            return message_in

        await self._app(scope, bounded, send)
