"""Fixtures of the HTTP server's tests: an invented engine, and the server over it, without a socket or with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.launch.fake_engine import FakeEngine, served
from tests.launch.http_answers import client_of


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path)


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    """Asks the server in this event loop; nothing listens."""
    async with client_of(engine) as client:
        yield client


@pytest.fixture
def url(engine: FakeEngine) -> Iterator[str]:
    """The address of a server in a thread."""
    with served(engine) as url:
        yield url
