"""`/generate`, `/abort` and `/load`: token ids in and out, and requests that are ended by their ids."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from launch.server.app import create_app
from tests.launch.fake_engine import ANSWER, FakeEngine


@pytest.fixture
async def client(engine: FakeEngine) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(engine), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_token_ids_go_in_and_come_out(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    for name in ("prompt_token_ids", "input_ids"):
        asked = {name: [65, 66], "sampling_params": {"max_tokens": 50, "seed": 3}}
        answer = (await client.post("/generate", json=asked, headers={"X-Request-Id": "one"})).json()
        assert answer["request_id"] == "gen-one"
        (output,) = answer["outputs"]
        assert engine.tokenizer.decode(output["token_ids"]) == ANSWER
        assert (output["index"], output["finish_reason"]) == (0, "stop")
        assert answer["usage"]["prompt_tokens"] == 2
        assert answer["usage"]["completion_tokens"] == len(output["token_ids"])
        assert engine.prompts[-1] == [65, 66]
        assert (engine.params[-1].seed, engine.params[-1].detokenize) == (3, False)


async def test_a_stream_has_what_is_new_and_the_counts_at_the_end(client: httpx.AsyncClient) -> None:
    params = {"max_tokens": 50, "n": 2, "logprobs": 1, "detokenize": True}
    asked = {"input_ids": [65], "sampling_params": params}
    whole = (await client.post("/generate", json=asked)).json()
    events = events_of(await client.post("/generate", json=asked | {"stream": True}))
    assert all("usage" not in event for event in events[:-1])
    assert events[-1]["usage"] == whole["usage"]
    for index in range(2):
        parts = [part for event in events for part in event["outputs"] if part["index"] == index]
        expected = whole["outputs"][index]
        assert [token for part in parts for token in part["token_ids"]] == expected["token_ids"]
        assert "".join(part.get("text", "") for part in parts) == expected["text"]
        assert [each for part in parts for each in part["logprobs"]] == expected["logprobs"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["stop"]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "prompt_token_ids"),
        ({"input_ids": [1], "prompt_token_ids": [1]}, "prompt_token_ids"),
        ({"input_ids": []}, "prompt"),
        ({"input_ids": [10**9]}, "prompt"),
        ({"input_ids": ["a"]}, "input_ids[0]"),
        ({"input_ids": [1], "rid": "x"}, "rid"),
        ({"input_ids": [1], "temperature": 0}, "temperature"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 3}}, "sampling_params.max_new_tokens"),
        ({"input_ids": [1], "sampling_params": {"best_of": 2}, "stream": True}, "sampling_params.best_of"),
        ({"input_ids": [1], "cache_salt": ""}, "cache_salt"),
    ],
)
async def test_what_cannot_be_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, asked: dict[str, object], param: str
) -> None:
    response = await client.post("/generate", json=asked)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "asked", [{}, {"request_id": "a", "abort_all": True}, {"request_id": []}, {"abort_all": False}, {"rid": "a"}]
)
async def test_an_abort_says_what_to_end(client: httpx.AsyncClient, asked: dict[str, object]) -> None:
    assert (await client.post("/abort", json=asked)).status_code == 400
