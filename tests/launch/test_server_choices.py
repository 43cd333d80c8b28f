"""Several choices of one HTTP request: their indexes, ends, counts and bounds, over an engine that invents answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from launch.server.schema import MAX_PROMPTS
from nanoengine import LLM, SamplingParams
from tests.launch.fake_engine import ANSWER, FakeEngine, served
from tests.launch.http_answers import HI, client_of, error_of, events_of

PATHS = ["/v1/completions", "/v1/chat/completions"]
ANSWERS = [ANSWER, f"{ANSWER} 1", f"{ANSWER} 2"]


def body_of(path: str) -> dict[str, Any]:
    return HI if "chat" in path else {"prompt": "a", "max_tokens": 50}


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


@pytest.mark.parametrize("path", PATHS)
async def test_each_choice_has_its_index_text_and_end(engine: FakeEngine, path: str) -> None:
    async with client_of(engine) as client:
        body = (await client.post(path, json=body_of(path) | {"n": 3, "logprobs": "chat" in path or 1})).json()
        assert [text_of(choice) for choice in body["choices"]] == ANSWERS
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert {choice["finish_reason"] for choice in body["choices"]} == {"stop"}
        single = (await client.post(path, json=body_of(path) | {"logprobs": "chat" in path or 1})).json()
        assert body["choices"][0] == single["choices"][0]
        assert engine.tokenizer is not None
        lengths = [len(engine.tokenizer.encode(text)) + 1 for text in ANSWERS]
        counted = [len(each["logprobs"].get("content") or each["logprobs"].get("tokens")) for each in body["choices"]]
        assert counted == lengths, "log-probabilities of each choice"
        assert body["usage"]["prompt_tokens"] == single["usage"]["prompt_tokens"]
        assert body["usage"]["completion_tokens"] == sum(lengths)


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_brings_each_choice_and_ends_it_once(engine: FakeEngine, path: str) -> None:
    wanted = body_of(path) | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    async with client_of(engine) as client:
        whole = (await client.post(path, json=body_of(path) | {"n": 3})).json()
        *events, usage = events_of(await client.post(path, json=wanted))
    texts, ends, roles = Counter[int](), Counter[int](), Counter[int]()
    parts: dict[int, str] = {0: "", 1: "", 2: ""}
    for event in events:
        (choice,) = event["choices"]
        index = choice["index"]
        assert not ends[index], "a chunk behind the end of its choice"
        parts[index] += choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        roles[index] += "role" in choice.get("delta", {})
        texts[index] += 1
        ends[index] += choice["finish_reason"] is not None
    assert list(parts.values()) == ANSWERS
    assert ends == {0: 1, 1: 1, 2: 1}
    assert set(roles.values()) == ({1} if "chat" in path else {0})
    assert usage["usage"] == whole["usage"]


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_follow_each_other(engine: FakeEngine, stream: bool) -> None:
    engine.answers = {"one": "first", "two": "second"}
    wanted = {"prompt": ["one", "two"], "n": 2, "stream": stream, "return_token_ids": True, "max_tokens": 50}
    async with client_of(engine) as client:
        response = await client.post("/v1/completions", json=wanted)
    choices = [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
    texts = ["", "", "", ""]
    prompts: dict[int, list[int]] = {}
    for choice in choices:
        texts[choice["index"]] += choice["text"]
        if "prompt_token_ids" in choice:
            assert choice["index"] not in prompts, "told once"
            prompts[choice["index"]] = choice["prompt_token_ids"]
    assert texts == ["first", "first 1", "second", "second 1"]
    assert engine.tokenizer is not None
    one, two = engine.tokenizer.encode("one"), engine.tokenizer.encode("two")
    assert prompts == {0: one, 1: one, 2: two, 3: two}
    assert [params.n for params in engine.params] == [2, 2]


async def test_a_stop_string_ends_its_choice_alone(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        body = (
            await client.post("/v1/completions", json={"prompt": "a", "n": 3, "stop": " 1", "max_tokens": 50})
        ).json()
    assert [choice["text"] for choice in body["choices"]] == [ANSWER, ANSWER, ANSWERS[2]]
    assert [choice["stop_reason"] for choice in body["choices"]] == [None, " 1", None]


@pytest.mark.parametrize("path", PATHS)
async def test_best_of_shows_the_n_best_and_counts_all(engine: FakeEngine, path: str) -> None:
    async with client_of(engine) as client:
        body = (await client.post(path, json=body_of(path) | {"n": 2, "best_of": 3})).json()
        every = (await client.post(path, json=body_of(path) | {"n": 3})).json()
        # The invented engine holds the last for the best.
        assert [text_of(choice) for choice in body["choices"]] == [ANSWERS[2], ANSWERS[1]]
        assert [choice["index"] for choice in body["choices"]] == [0, 1]
        assert body["usage"] == every["usage"]

        error = error_of(await client.post(path, json=body_of(path) | {"best_of": 3, "stream": True}), 400)
        assert error["param"] == "best_of"
        same = await client.post(path, json=body_of(path) | {"n": 2, "best_of": 2, "stream": True})
        assert {event["choices"][0]["index"] for event in events_of(same)} == {0, 1}
        error = error_of(await client.post(path, json=body_of(path) | {"n": 3, "best_of": 2}), 400)
        assert error["param"] == "best_of"
        assert "best_of must be from n (3) to 64, got 2" in error["message"]


async def test_prompts_times_choices_are_bounded(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        for field in ("n", "best_of"):
            wanted = {"prompt": ["a"] * MAX_PROMPTS, field: 17}
            error = error_of(await client.post("/v1/completions", json=wanted), 400)
            assert error["param"] == field
            assert f"{field} must be at most 16 with {MAX_PROMPTS} prompts, got 17" in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_fails_behind_its_first_choice_fails(engine: FakeEngine, stream: bool) -> None:
    engine.fail_after, engine.failure_kind = 3, "EngineError"
    async with client_of(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": "a", "n": 2, "stream": stream})
    assert "rank 1 fell over" in response.text


def test_the_python_client_gets_all_choices_of_a_server(engine: FakeEngine) -> None:
    with served(engine) as url, LLM(base_url=url) as llm:
        [output] = llm.generate(["a"], SamplingParams(n=3, max_tokens=50), use_tqdm=False)
        assert [each.text for each in output.outputs] == ANSWERS
        assert [each.index for each in output.outputs] == [0, 1, 2]
        assert output.metrics.num_completion_tokens == sum(len(each.token_ids) for each in output.outputs)
        [best] = llm.generate(["a"], SamplingParams(n=1, best_of=3, max_tokens=50), use_tqdm=False)
        assert [each.text for each in best.outputs] == [ANSWERS[2]]
        assert best.metrics.num_completion_tokens == output.metrics.num_completion_tokens
