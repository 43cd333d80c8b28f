"""The HTTP routes and the sampling fields: what reaches the engine, and log-probabilities in OpenAI's two shapes."""

from __future__ import annotations

import dataclasses

import httpx
import pytest

from tests.launch.fake_engine import ANSWER, FakeEngine
from tests.launch.http_answers import HI, error_of, events_of


async def test_fields_that_change_logits_reach_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "min_tokens": 2,
        "include_stop_str_in_output": True, "skip_special_tokens": False,
        "logit_bias": {"5": 200, "7": -1.5}, "allowed_token_ids": [5, 6, 5], "bad_words": ["no"],
    }  # fmt: skip
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", HI)):
        response = await client.post(path, json=body | fields)
        assert response.status_code == 200, response.text
        params = engine.params[-1]
        assert params.logit_bias == {5: 100.0, 7: -1.5}
        assert params.allowed_token_ids == (5, 6)
        assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -1, 1.1)
        assert params.min_tokens == 2
        assert params.include_stop_str_in_output
        assert not params.skip_special_tokens
        assert params.bad_words_token_ids


async def test_a_completions_logprobs_have_openais_legacy_shape(client: httpx.AsyncClient) -> None:
    body = {"prompt": "a", "max_tokens": 50, "logprobs": 1}
    whole = (await client.post("/v1/completions", json=body)).json()["choices"][0]["logprobs"]
    assert set(whole) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len({len(column) for column in whole.values()}) == 1
    assert whole["token_logprobs"] == [-3.0] * len(whole["tokens"])
    # The likeliest one, and the chosen one although it is not the likeliest.
    tops = list(zip(whole["tokens"], whole["top_logprobs"], strict=True))
    assert all(len(top) == 2 and top[token] == -3.0 for token, top in tops if "\ufffd" not in token)
    assert all(token in top for token, top in tops)
    lengths = [len(token) for token in whole["tokens"]]
    assert whole["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
    chunks = events_of(await client.post("/v1/completions", json=body | {"stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: [entry for part in parts if part for entry in part[name]] for name in whole} == whole


@pytest.mark.parametrize("number", [0, 2, 5])
async def test_a_chats_logprobs_have_openais_shape(client: httpx.AsyncClient, number: int) -> None:
    body = HI | {"logprobs": True, "top_logprobs": number}
    whole = (await client.post("/v1/chat/completions", json=body)).json()["choices"][0]["logprobs"]
    raw = b"".join(bytes(entry["bytes"]) for entry in whole["content"])
    assert raw.startswith(ANSWER.encode()), "bytes join to the text even where a character spans tokens"
    for entry in whole["content"]:
        assert entry["logprob"] == -3.0
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-float(rank) for rank in range(1, number + 1)]
    chunks = events_of(await client.post("/v1/chat/completions", json=body | {"stream": True}))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for part in parts if part for entry in part["content"]] == whole["content"]


async def test_logprobs_out_of_range_name_the_field_of_their_route(client: httpx.AsyncClient) -> None:
    error = error_of(await client.post("/v1/completions", json={"prompt": "a", "logprobs": 21}), 400)
    assert (error["param"], "at most 20" in error["message"]) == ("logprobs", True)
    body = HI | {"logprobs": True, "top_logprobs": 21}
    error = error_of(await client.post("/v1/chat/completions", json=body), 400)
    assert (error["param"], "top_logprobs must be" in error["message"]) == ("top_logprobs", True)


async def test_fields_left_out_take_the_checkpoints_defaults(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.config.checkpoint is not None
    defaults = (("temperature", 0.6), ("top_k", 20), ("max_tokens", 5))
    checkpoint = dataclasses.replace(engine.config.checkpoint, default_sampling=defaults)
    engine.config = dataclasses.replace(engine.config, checkpoint=checkpoint)
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", HI)):
        await client.post(path, json=body | {"top_k": -1, "temperature": None})
        assert (engine.params[-1].temperature, engine.params[-1].top_k) == (0.6, -1)
        await client.post(path, json=body | {"temperature": 1.0})
        assert (engine.params[-1].temperature, engine.params[-1].top_k) == (1.0, 20)
        # OpenAI's 16 is a default of completions already, as in vLLM.
        assert engine.params[-1].max_tokens == (16 if path == "/v1/completions" else 5)
        await client.post(path, json=body | {"max_tokens": 7})
        assert engine.params[-1].max_tokens == 7
