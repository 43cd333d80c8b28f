"""What a client may say about how its request is scheduled, over an engine that invents its answers."""

from __future__ import annotations

import pytest

from tests.launch.fake_engine import FakeEngine
from tests.launch.test_server_app import HI, client_of, error_of


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> FakeEngine:
    return FakeEngine(tmp_path_factory.mktemp("engine"))


async def test_cache_salt_reaches_the_engine_with_each_prompt(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        await client.post("/v1/completions", json={"prompt": ["a", "b"], "cache_salt": "tenant"})
        await client.post("/v1/chat/completions", json=HI | {"cache_salt": None})
        assert engine.salts == ["tenant", "tenant", ""]
        for wrong in ("", "x" * 257):
            response = await client.post("/v1/completions", json={"prompt": "a", "cache_salt": wrong})
            assert error_of(response, 400)["param"] == "cache_salt"


async def test_prefix_cache_is_reset_on_request(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        assert (await client.post("/reset_prefix_cache")).status_code == 200
        assert engine.num_resets == 1
        engine.is_ready = False
        error_of(await client.post("/reset_prefix_cache"), 503)
