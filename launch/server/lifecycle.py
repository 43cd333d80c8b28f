"""What a front end tells its routes of itself: whether it drains, and how much it still answers; knows no engine."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Resuming a stream is work as well, although it is a GET.
_STREAMS = "/v1/streams/"


class Lifecycle:
    """Shared by the server, which changes `draining`, and the routes, which obey.

    `num_open` counts requests for work that are not answered in full yet. Probes, metrics and a page that looks on are
    not work: they hold up no stop.
    """

    def __init__(self) -> None:
        self.draining = False
        self.num_open = 0


class CountOpen:
    """Counts the open requests; while it drains, each answer ends its connection, so that clients look elsewhere."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start" and self._lifecycle.draining:
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        is_work = scope["method"] == "POST" or scope["path"].startswith(_STREAMS)
        self._lifecycle.num_open += is_work
        try:
            await self._app(scope, receive, marked)
        finally:
            self._lifecycle.num_open -= is_work
