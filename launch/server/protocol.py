"""uvicorn's HTTP protocol with bounds on what precedes a request; knows nothing of the request.

uvicorn waits for ever for headers, and with httptools takes headers without end.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from launch.server.middleware import MAX_HEADER_BYTES

try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as _Protocol
except ImportError:  # the faster parser is not installed
    from uvicorn.protocols.http.h11_impl import H11Protocol as _Protocol  # type: ignore[assignment]

# From the connection, or from a request's first byte on a connection that is kept, to its last header.
HEADER_SECONDS = 20.0


class BoundedProtocol(_Protocol):
    """Closes a connection whose headers are too long in coming, or too large."""

    if TYPE_CHECKING:
        cycle: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._disarm()
        elif before is None or before.response_complete:
            self._arm()
            if before is None or not before.more_body:  # else it is a body that was answered before it was all there
                self._pending_bytes += len(data)
            if self._pending_bytes > 2 * MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("The headers are too large.")

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def _arm(self) -> None:
        if self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _disarm(self) -> None:
        self._pending_bytes = 0
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
