"""Lets requests for generation begin a few at a time, so that a crowd of them does not hold up everybody else.

To begin one (read, check, tokenise, submit) takes a front end about a millisecond of its event loop, and asyncio would
begin all that have arrived before it looks at its sockets again. It knows no request and no engine.
"""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.types import ASGIApp, Receive, Scope, Send

from launch.server.access import GENERATION_PATHS
from nanoengine.watched import vital

# In one turn of the event loop: some milliseconds, of the 100 in which a probe is to be answered under full load.
BEGIN_BATCH = 4


class BeginInTurns:
    """Has a request for generation wait for its turn, in the order of arrival; everything else passes at once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_left = BEGIN_BATCH  # that may begin in this turn
        self._is_turning = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in GENERATION_PATHS:
            await self._turn()
        await self._app(scope, receive, send)

    async def _turn(self) -> None:
        loop = asyncio.get_running_loop()
        if not self._is_turning:
            self._is_turning = True
            loop.call_soon(self._next_turn)
        if self._num_left:
            self._num_left -= 1
            return
        turn = loop.create_future()
        self._waiting.append(turn)
        await turn

    @vital
    def _next_turn(self) -> None:
        """The loop has looked at its sockets meanwhile."""
        self._num_left, self._is_turning = BEGIN_BATCH, False  # also should it break off: the next arrival goes on
        while self._waiting and self._num_left:
            turn = self._waiting.popleft()
            if not turn.done():  # its client has gone
                turn.set_result(None)
                self._num_left -= 1
        self._is_turning = self._num_left < BEGIN_BATCH
        if self._is_turning:
            asyncio.get_running_loop().call_soon(self._next_turn)

    def break_down(self, error: BaseException) -> None:
        """Nobody waits for a turn that may not come: all begin."""
        waiting, self._waiting = self._waiting, deque()
        self._is_turning, self._num_left = False, BEGIN_BATCH
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
