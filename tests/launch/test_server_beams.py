"""Beam search over HTTP: which fields it takes, what it refuses, and LLM against such a server."""

from __future__ import annotations

from typing import Any

import pytest

from nanoengine import LLM, BeamSearchParams
from tests.launch.fake_engine import ANSWER, FakeEngine, served
from tests.launch.http_answers import HI, client_of, error_of

PATHS = ["/v1/completions", "/v1/chat/completions"]
ANSWERS = [ANSWER, f"{ANSWER} 1", f"{ANSWER} 2"]


def body_of(path: str) -> dict[str, Any]:
    body = HI if "chat" in path else {"prompt": "a", "max_tokens": 50}
    return body | {"use_beam_search": True, "n": 3}


@pytest.mark.parametrize("path", PATHS)
async def test_each_beam_is_a_choice(engine: FakeEngine, path: str) -> None:
    wanted = {"length_penalty": 0.5, "early_stopping": "never", "ignore_eos": False, "temperature": 1.0, "seed": 3}
    async with client_of(engine) as client:
        body = (await client.post(path, json=body_of(path) | wanted)).json()
    texts = [choice["message"]["content"] if "chat" in path else choice["text"] for choice in body["choices"]]
    assert texts == ANSWERS
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert engine.beams == [
        BeamSearchParams(3, None if "chat" in path else 50, temperature=1.0, length_penalty=0.5, early_stopping="never")
    ]


async def test_one_beam_is_the_default_and_neutral_fields_are_taken(engine: FakeEngine) -> None:
    neutral = {"best_of": 1, "top_p": 1, "top_k": -1, "stop": [], "presence_penalty": 0.0, "stream": False}
    async with client_of(engine) as client:
        body = (await client.post("/v1/completions", json={"prompt": "a", "use_beam_search": True} | neutral)).json()
    assert len(body["choices"]) == 1
    assert engine.beams == [BeamSearchParams(1)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("wanted", "param", "words"),
    [
        ({"stream": True}, "stream", "stream must be false with use_beam_search"),
        ({"stop": "x"}, "stop", "stop does not go with use_beam_search, got 'x'"),
        ({"stop_token_ids": [3]}, "stop_token_ids", "stop_token_ids does not go with"),
        ({"top_k": 3}, "top_k", "top_k does not go with"),
        ({"min_tokens": 1}, "min_tokens", "min_tokens does not go with"),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format does not go with"),
        ({"best_of": 5}, "best_of", "best_of does not go with"),
        ({"temperature": 0.5}, "temperature", "temperature must be 0 or 1"),
        ({"n": 65}, "n", "n must be at least 1 and at most 64"),
        ({"early_stopping": "now"}, "early_stopping", "early_stopping must be true, false or 'never', got 'now'"),
        ({"length_penalty": 40}, "length_penalty", "at most 32"),
        ({"beam_width": 3}, "beam_width", "beam_width is not a field"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty", "needs use_beam_search: true, got 2"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping", "needs use_beam_search: true, got True"),
    ],
)
async def test_what_does_not_go_with_a_beam_search_is_refused_by_name(
    engine: FakeEngine, path: str, wanted: dict[str, Any], param: str, words: str
) -> None:
    async with client_of(engine) as client:
        error = error_of(await client.post(path, json=body_of(path) | wanted), 400)
    assert error["param"] == param
    assert words in error["message"]
    assert not engine.prompts


def test_llm_searches_on_a_running_server(engine: FakeEngine) -> None:
    params = BeamSearchParams(3, 50, length_penalty=0.25, early_stopping=True, skip_special_tokens=False)
    with served(engine) as url, LLM(base_url=url) as llm:
        (output,) = llm.beam_search(["a"], params)
    assert [each.text for each in output.outputs] == ANSWERS
    assert engine.beams == [params]


async def test_echo_shows_the_prompt_before_each_beam_but_tells_no_log_probabilities_of_it(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        wanted = body_of("/v1/completions") | {"echo": True}
        body = (await client.post("/v1/completions", json=wanted)).json()
        assert [choice["text"] for choice in body["choices"]] == [f"a{answer}" for answer in ANSWERS]
        error = error_of(await client.post("/v1/completions", json=wanted | {"logprobs": 1}), 400)
        assert error["param"] == "prompt_logprobs"
