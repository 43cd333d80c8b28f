"""What a request may say about how it is scheduled: checked in the front end, and sent to the scheduler."""

from __future__ import annotations

import pytest

from configs.engine import EngineConfig
from configs.errors import RequestError
from nanoengine.engine_client import EngineClient
from nanoengine.messages import AddRequest, ResetPrefixCache
from nanoengine.prompts import parse_prompt


@pytest.fixture
def client() -> EngineClient:
    return EngineClient(EngineConfig.create(model="demo").resolve())


def test_cache_salt_of_a_prompt_is_sent_with_it(client: EngineClient) -> None:
    client.add(client.check(parse_prompt({"prompt_token_ids": [1, 2], "cache_salt": "tenant"})))
    [message] = client.outbox
    assert isinstance(message, AddRequest)
    assert message.cache_salt == "tenant"


@pytest.mark.parametrize("salt", ["", "x" * 257, 7, "half \ud83d"])
def test_impossible_cache_salt_is_refused(salt: object) -> None:
    with pytest.raises(RequestError, match="cache_salt"):
        parse_prompt({"prompt": "a", "cache_salt": salt})


def test_reset_of_the_prefix_cache_is_a_message(client: EngineClient) -> None:
    client.reset_prefix_cache()
    assert list(client.outbox) == [ResetPrefixCache()]
