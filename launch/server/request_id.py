"""The id of each HTTP request: a client's own X-Request-Id, or one that is drawn here; knows no route and no engine.

It comes back in the answer's header, is part of the answer's id, and stands in the log.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.server.errors import ApiError

HEADER = "X-Request-Id"
MAX_CHARS = 128
# What fits into a path, a log line and a shell without quoting.
_ALLOWED = re.compile(rb"[A-Za-z0-9._~:@+=-]{1,%d}" % MAX_CHARS)

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The id of the HTTP request that this task answers, for log lines; None outside of one."""


class RequestIds:
    """Gives each request its id, as `request.state.request_id`, and each answer the header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), None)
        is_good = given is None or _ALLOWED.fullmatch(given) is not None
        request_id = uuid.uuid4().hex if given is None or not is_good else given.decode("ascii")
        scope.setdefault("state", {})["request_id"] = request_id
        current_request_id.set(request_id)  # each request has a task, and so a context, of its own

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        if is_good:
            await self._app(scope, receive, named)
            return
        error = ApiError(
            400,
            f"the header {HEADER} must be 1 to {MAX_CHARS} letters, digits and characters of ._~:@+=-, "
            f"got {(given or b'')[:100].decode('latin-1')!r}",
            param=HEADER,
        )
        await error.response()(scope, receive, named)
