"""What every request passes before a route sees it: the key and the size of its body; knows no route's meaning.

Plain ASGI: nothing is buffered and a stream passes untouched.
"""

from __future__ import annotations

import hmac

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.server import page
from launch.server.errors import AUTHENTICATION, ApiError

MAX_BODY_BYTES = 8 * 2**20
OPEN_PATHS = page.PATHS | {"/livez"}


class ApiKeyGuard:
    """Refuses what does not carry the key, on every path but `OPEN_PATHS`."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app = app
        self._expected = b"Bearer " + api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401, "send the server's key as `Authorization: Bearer KEY`", AUTHENTICATION, code="invalid_api_key"
        )
        await error.response()(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        # The scheme's name has no case; the key is compared in constant time.
        return hmac.compare_digest(scheme.title() + b" " + key.strip(), self._expected)


class BodyLimit:
    """Refuses a body larger than `MAX_BODY_BYTES`, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, limit: int = MAX_BODY_BYTES) -> None:
        self._app, self._limit = app, limit

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
        received = 0

        async def counted() -> Message:
            nonlocal received
            message_in = await receive()
            received += len(message_in.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, message)
            return message_in

        await self._app(scope, counted, send)
