"""Waiting for what tests are offered no event for. Only a failure ever meets a deadline, so it is a generous one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PATIENCE = 30.0
"""Seconds. What takes a moment on a quiet machine may take a hundred times as long on a busy one."""


def eventually(condition: Callable[[], object], timeout: float = PATIENCE) -> bool:
    """Whether `condition` comes true within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def until(
    condition: Callable[[], object], timeout: float = PATIENCE, why: str | Callable[[], object] = "it did not happen"
) -> None:
    """Return once `condition` is true. Fails after `timeout` seconds with `why`, which may be asked for only then."""
    assert eventually(condition, timeout), why() if callable(why) else why


async def until_async(condition: Callable[[], object], timeout: float = PATIENCE) -> None:  # noqa: ASYNC109
    """`until` for whoever shares an event loop with what is waited for."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)
