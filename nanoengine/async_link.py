"""The way between an event loop and an engine: connects to the scheduler, and to the next one when it is gone.

It knows no stream: who has news is told to whoever made it.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from configs.errors import DeadlineError
from nanoengine.connection import SchedulerConnection
from nanoengine.engine_client import EngineClient
from nanoengine.engine_status import EngineStatus
from nanoengine.journal import RequestJournal
from nanoengine.watched import vital

_GREETING_POLL = 0.02


class AsyncLink:
    """Carries what `client` has to say to the engine's present scheduler, and its answers; for one event loop.

    Args:
        engine: ready.
        on_news: is given the requests that have news, each once, perhaps none.
        break_down: is given what was raised in here where nobody would see it, see `nanoengine.watched.vital`.
    """

    def __init__(
        self,
        engine: EngineStatus,
        client: EngineClient,
        on_news: Callable[[list[RequestJournal]], None],
        break_down: Callable[[BaseException], None],
    ) -> None:
        """Must be called on the event loop."""
        self._engine, self._client, self._on_news, self.break_down = engine, client, on_news, break_down
        self._loop = asyncio.get_running_loop()
        self._connection: SchedulerConnection | None = None
        self._incarnation = 0  # of the scheduler at its other end
        self._engine_fd = engine.fileno()
        self._loop.add_reader(self._engine_fd, self.look)

    async def greet(self, timeout: float) -> None:  # noqa: ASYNC109 - the scheduler's, whoever waits
        """Return once the scheduler has told what it learnt. Raises EngineDeadError, or DeadlineError."""
        self.look()
        for _ in range(int(timeout / _GREETING_POLL)):
            self._client.check_alive()
            if self._client.facts is not None:
                return
            await asyncio.sleep(_GREETING_POLL)
        raise DeadlineError(f"the scheduler did not answer a greeting within {timeout:g} s")

    @vital
    def pump(self) -> None:
        """Messages arrived, or some may be sent."""
        if self._connection is None:
            return
        updated, has_more = self._connection.pump()
        self._on_news(updated)
        if has_more:
            self._loop.call_soon(self.pump)

    @vital
    def look(self) -> None:
        """Something happened to the engine: leave a scheduler that is gone, connect to the next, or end it all."""
        condition = self._engine.look()
        if self._connection is not None and (not condition.serves or condition.incarnation != self._incarnation):
            self.pump()  # its last words
            self._disconnect()
            self._client.detach(condition)
            self._on_news([])
        if condition.is_final and condition.cause is not None:
            self._ignore_engine()
            self._on_news(self._client.fail(condition.cause))
        elif condition.serves and self._connection is None:
            self._client.attach(condition)
            self._connect(condition.address)
            self._incarnation = condition.incarnation
            self.pump()

    def watch(self) -> None:
        """Call it about once a second while the client is waiting: notices a scheduler that hangs."""
        self.look()
        self._on_news(self._client.watch())
        if (error := self._client.hung) is not None:
            self._engine.replace(self._incarnation, error)
        self.pump()

    def close(self) -> None:
        """Give back the socket and what waits for it; the engine goes on. Harmless twice."""
        self._ignore_engine()
        self._disconnect()

    def _connect(self, address: str) -> None:
        self._connection = SchedulerConnection(address, self._client)
        self._finalizer = weakref.finalize(self, self._connection.close)
        self._loop.add_reader(self._connection.fileno(), self.pump)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            if not self._loop.is_closed():
                self._loop.remove_reader(connection.fileno())
            self._finalizer()

    def _ignore_engine(self) -> None:
        if self._engine_fd >= 0 and not self._loop.is_closed():
            self._loop.remove_reader(self._engine_fd)
        self._engine_fd = -1
