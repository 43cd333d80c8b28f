"""Watches HTTP requests from outside of everything else: counts each answer and logs it; reads no body.

A line of the log names the client's address, method, route, status, seconds and the request's id. A route is shown as
its pattern, never as what the client wrote.
"""

from __future__ import annotations

import logging
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.server.metrics import ServerMetrics
from launch.server.peers import is_from_peer

logger = logging.getLogger(__name__)

GENERATION_PATHS = frozenset({"/v1/completions", "/v1/chat/completions", "/generate"})
# What asks again and again whether, or how, the server is; logged at level debug, as is what only reads.
PROBES = frozenset({"/health", "/livez", "/readyz", "/load", "/metrics", "/engine/state"})


class ObserveHttp:
    """Plain ASGI: nothing is buffered and a stream passes untouched.

    Args:
        access_log: whether answers are logged, too.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics, access_log: bool) -> None:
        self._app, self._metrics, self._access_log = app, metrics, access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_from_peer(scope):
            await self._app(scope, receive, send)
            return
        status, began = 500, time.perf_counter()  # an exception that nobody caught is answered further outside

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._answered(scope, status, time.perf_counter() - began)

    def _answered(self, scope: Scope, status: int, seconds: float) -> None:
        method, path = scope["method"], scope["path"]
        is_generation = path in GENERATION_PATHS
        route: str = scope["route"].path if "route" in scope else path if is_generation else "other"
        self._metrics.answered(method, route, status, is_generation and method == "POST")
        if not self._access_log:
            return
        is_quiet = path in PROBES or (method in ("GET", "HEAD") and status < 400)
        address = scope["client"][0] if scope.get("client") else "-"
        logger.log(
            logging.DEBUG if is_quiet else logging.INFO,
            "%s %s %s %d in %.3f s", address, method, route, status, seconds,
            extra={
                "request_id": scope["state"]["request_id"],
                "fields": {"method": method, "route": route, "status": status, "seconds": round(seconds, 6)},
            },
        )  # fmt: skip
