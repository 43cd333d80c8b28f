"""Waiting for one thing or another, and leaving neither behind; knows nothing of what is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from starlette.types import Receive


async def either(one: asyncio.Future[Any], other: asyncio.Future[Any], seconds: float | None = None) -> None:
    """Return when one of the two is done, or after so many seconds."""
    await asyncio.wait([one, other], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


async def cancelled(*futures: asyncio.Future[Any]) -> None:
    """Cancel them and wait for their ends. Their results, errors included, interest nobody any more."""
    for future in futures:
        future.cancel()
    await asyncio.gather(*futures, return_exceptions=True)


async def hang_up(receive: Receive) -> None:
    """Return when the client of a request whose body has been read has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def closed(events: AsyncGenerator[Any, None], *futures: asyncio.Future[Any]) -> None:
    """Cancel what still waits, then close the events, which ends their requests."""
    await cancelled(*futures)
    await events.aclose()
