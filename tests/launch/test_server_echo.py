"""What an answer repeats of its prompt over HTTP: text and log-probabilities, in OpenAI's shape and in vLLM's."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.launch.fake_engine import ANSWER, FakeEngine
from tests.launch.http_answers import HI, error_of, events_of

PROMPT = "中国 is big"


def ids_of(engine: FakeEngine, text: str = PROMPT) -> list[int]:
    assert engine.tokenizer is not None
    return engine.tokenizer.encode(text)


async def ask(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 50} | body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def stream(client: httpx.AsyncClient, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    return events_of(await client.post(path, json={"stream": True} | body))


def joined(chunks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The columns of all chunks' logprobs."""
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}


async def test_echo_puts_the_prompt_in_front_of_text_and_of_ids(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answers = {"other": "!"}
    body = await ask(client, prompt=[PROMPT, "other"], echo=True)
    assert [choice["text"] for choice in body["choices"]] == [PROMPT + ANSWER, "other!"]
    assert body["choices"][0]["logprobs"] is None
    assert "prompt_logprobs" not in body["choices"][0]
    assert body["usage"]["completion_tokens"] == len(ids_of(engine, ANSWER)) + len(ids_of(engine, "!")) + 2
    assert (await ask(client, prompt=ids_of(engine), echo=True))["choices"][0]["text"] == PROMPT + ANSWER
    assert (await ask(client, echo=False))["choices"][0]["text"] == ANSWER
    chunks = await stream(client, prompt=PROMPT, max_tokens=50, echo=True)
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts[0].startswith(PROMPT)
    assert "".join(texts) == PROMPT + ANSWER


async def test_echo_with_logprobs_covers_prompt_and_output(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    (choice,) = (await ask(client, echo=True, logprobs=1, return_token_ids=True))["choices"]
    told, prompt = choice["logprobs"], ids_of(engine)
    assert choice["prompt_token_ids"] == prompt
    assert told["tokens"] == [engine.tokenizer.token_text(token) for token in prompt + choice["token_ids"]]
    assert told["token_logprobs"] == [None, *[-3.0] * (len(told["tokens"]) - 1)]
    assert told["top_logprobs"][0] is None
    # One key where the likeliest and the chosen token read the same, as parts of characters do.
    assert {tuple(sorted(top.values())) for top in told["top_logprobs"][1:]} == {(-3.0, -1.0), (-1.0,)}
    lengths = [len(token) for token in told["tokens"]]
    assert told["text_offset"] == [sum(lengths[:i]) for i in range(len(lengths))]
    assert engine.params[-1].prompt_logprobs == 1
    chunks = await stream(client, prompt=PROMPT, max_tokens=50, echo=True, logprobs=1)
    assert joined(chunks) == told
    assert len(chunks[0]["choices"][0]["logprobs"]["tokens"]) == len(prompt) + 1, "the prompt with the first token"


async def test_each_of_several_outputs_has_the_prompt_in_front(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "other"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 50}
    body = await ask(client, **asked)
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in body["choices"]]
    assert [text.startswith(each) for text, each in zip(texts, (PROMPT, PROMPT, "other", "other"), strict=True)]
    chunks = await stream(client, **asked)
    for index, choice in enumerate(body["choices"]):
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert choice["prompt_logprobs"] == body["choices"][index // 2 * 2]["prompt_logprobs"]
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(chunk["choices"][0]["text"] for chunk in own) == choice["text"]
        assert joined(own) == choice["logprobs"]
    body = await ask(client, **asked | {"max_tokens": 0})
    assert [choice["text"] for choice in body["choices"]] == [PROMPT, PROMPT, "other", "other"]
    assert body["usage"]["completion_tokens"] == 0


async def test_no_tokens_but_the_prompts_logprobs(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """What evaluation harnesses ask. One token is generated all the same, as in vLLM, and not shown."""
    prompts = [ids_of(engine), ids_of(engine, "other")]
    asked: dict[str, Any] = {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1, "return_token_ids": True}
    body = await ask(client, **asked)
    for choice, prompt, text in zip(body["choices"], prompts, (PROMPT, "other"), strict=True):
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "length", None)
        assert (choice["token_ids"], choice["output_logprobs"]) == ([], [])
        assert choice["logprobs"]["token_logprobs"] == [None, *[-3.0] * (len(prompt) - 1)]
    assert body["usage"]["completion_tokens"] == 0
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert [params.max_tokens for params in engine.params] == [1, 1]
    chunks = await stream(client, **asked | {"prompt": PROMPT}, stream_options={"include_usage": True})
    assert [choice["text"] for chunk in chunks for choice in chunk["choices"]] == [PROMPT]
    assert joined(chunks) == body["choices"][0]["logprobs"]
    assert chunks[-1]["usage"]["completion_tokens"] == 0
    assert (await ask(client, max_tokens=0, echo=True))["choices"][0]["text"] == PROMPT


async def test_what_lm_evaluation_harness_reads(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = await ask(client, prompt=[ids_of(engine)], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    told, context = body["choices"][0]["logprobs"], 2
    assert sum(told["token_logprobs"][context:-1]) == -3.0 * (len(ids_of(engine)) - context)
    for chosen, top in zip(told["token_logprobs"][context:-1], told["top_logprobs"][context:-1], strict=True):
        assert chosen != max(top.values()), "the third in rank is not greedy"


async def test_prompt_logprobs_stand_where_vllm_puts_them(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    (choice,) = (await ask(client, prompt_logprobs=1))["choices"]
    told, second = choice["prompt_logprobs"], ids_of(engine)[1]
    assert told[0] is None
    assert len(told) == len(ids_of(engine))
    assert list(told[1]) == [str(second), "100"]
    assert told[1][str(second)] == {
        "logprob": -3.0, "rank": 3, "decoded_token": engine.tokenizer.token_text(second),
    }  # fmt: skip
    assert choice["logprobs"] is None
    assert choice["text"] == ANSWER
    chunks = await stream(client, prompt=PROMPT, max_tokens=50, prompt_logprobs=1)
    assert [chunk["choices"][0].get("prompt_logprobs") for chunk in chunks] == [told, *[None] * (len(chunks) - 1)]
    chat = (await client.post("/v1/chat/completions", json=HI | {"prompt_logprobs": 0})).json()
    assert "prompt_logprobs" not in chat["choices"][0]
    assert [len(entry or ()) for entry in chat["prompt_logprobs"]] == [0, *[1] * (chat["usage"]["prompt_tokens"] - 1)]
    chunks = await stream(client, "/v1/chat/completions", **HI, prompt_logprobs=0)
    assert [chunk.get("prompt_logprobs") for chunk in chunks] == [chat["prompt_logprobs"], *[None] * (len(chunks) - 1)]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_more_may_be_told_beside_than_in_openais_shape(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    (choice,) = (await ask(client, echo=True, logprobs=0, prompt_logprobs=5))["choices"]
    assert engine.params[-1].prompt_logprobs == 5
    assert {len(entry) for entry in choice["prompt_logprobs"][1:]} == {5}
    assert {len(top) for top in choice["logprobs"]["top_logprobs"][1:]} == {1}


async def test_echo_in_a_chat_repeats_a_last_message_of_the_assistants(client: httpx.AsyncClient) -> None:
    begun = {"messages": [*HI["messages"], {"role": "assistant", "content": "So: "}], "echo": True}
    for body, expected in ((begun, "So: " + ANSWER), (HI | {"echo": True}, ANSWER), (begun | {"echo": False}, ANSWER)):
        answer = (await client.post("/v1/chat/completions", json=body)).json()
        assert answer["choices"][0]["message"]["content"] == expected
        chunks = await stream(client, "/v1/chat/completions", **body)
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"echo": "yes"}, "echo"), ({"echo": 1}, "echo"), ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"), ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": "1"}, "prompt_logprobs"), ({"echo": True, "logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 0, "logprobs": 1}, "max_tokens"),
        ({"echo": True, "max_tokens": -1}, "max_tokens"), ({"echo": True, "prompt": []}, "prompt"),
        ({"echo": True, "max_tokens": 0, "min_tokens": 2}, "min_tokens"),
        ({"echo": True, "prompt": [10**6]}, "prompt"), ({"echo": True, "prompt": [-1]}, "prompt"),
    ],
)  # fmt: skip
async def test_an_impossible_value_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, body: dict[str, Any], param: str
) -> None:
    for streaming in (False, True):
        response = await client.post("/v1/completions", json={"prompt": PROMPT, "stream": streaming} | body)
        assert error_of(response, 400)["param"] == param


async def test_echo_without_a_tokenizer_is_refused(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    prompt = ids_of(engine)
    engine.tokenizer = None
    assert error_of(await client.post("/v1/completions", json={"prompt": prompt, "echo": True}), 400)["param"] == "echo"
