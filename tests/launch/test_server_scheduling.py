"""What a client may say about how its request is scheduled, over an engine that invents its answers."""

from __future__ import annotations

import pytest

from configs.engine import EngineConfig
from configs.errors import ConfigError
from launch.supervisor import with_server_defaults
from nanoengine.tokenizer import Tokenizer
from tests.launch.fake_engine import FakeEngine
from tests.launch.http_answers import HI, client_of, error_of, events_of


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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_full_queue_is_429_with_retry_after_before_anything_is_tokenised(
    engine: FakeEngine, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenise(*_: object) -> None:
        raise AssertionError("tokenised for nothing")

    monkeypatch.setattr(Tokenizer, "encode_batch", tokenise)
    monkeypatch.setattr(Tokenizer, "apply_chat_template", tokenise)
    engine.queue_is_full = True
    async with client_of(engine) as client:
        response = await client.post(path, json=HI if "chat" in path else {"prompt": ["a", "b"]})
    error = error_of(response, 429)
    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
    assert response.headers["retry-after"] == "1"


async def test_priority_and_timeout_reach_the_engine_with_each_prompt(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        await client.post("/v1/completions", json={"prompt": ["a", "b"], "priority": -2, "timeout": 1.5})
        await client.post("/v1/chat/completions", json=HI | {"priority": None})
    assert engine.scheduling == [{"priority": -2, "timeout": 1.5}] * 2 + [{}]


async def test_request_that_ran_out_of_time_is_504(engine: FakeEngine) -> None:
    engine.fail_after, engine.failure_kind = 12, "RequestTimeoutError"
    async with client_of(engine) as client:
        error = error_of(await client.post("/v1/completions", json={"prompt": "a"}), 504)
        assert (error["type"], error["code"]) == ("timeout_error", "request_timeout")
        stream = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    last = events_of(stream)[-1]
    assert last["error"]["code"] == "request_timeout"


def test_servers_bound_the_gap_unless_told_otherwise() -> None:
    def gap(**settings: float) -> float | None:
        return with_server_defaults(EngineConfig.create(**settings)).scheduler.max_decode_gap

    assert (gap(), gap(max_decode_gap=0.0), gap(max_decode_gap=2.0)) == (3.0, 0.0, 2.0)
    assert not EngineConfig.create().scheduler.max_decode_gap
    with pytest.raises(ConfigError, match="0 or at least 1"):
        gap(max_decode_gap=0.5)
