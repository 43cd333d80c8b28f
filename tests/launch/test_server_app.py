"""Each route and each error of the HTTP server, over an engine that invents its answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import EngineDeadError, EngineError, WorkerError
from launch.server.middleware import MAX_BODY_BYTES
from nanoengine.version import __version__
from tests.launch.fake_engine import ANSWER, MAX_MODEL_LEN, FakeEngine
from tests.launch.http_answers import HI, client_of, error_of, events_of

# --- completions ---


async def test_a_completion_has_openais_shape_and_exact_counts(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    response = await client.post("/v1/completions", json={"model": "demo", "prompt": "中国", "max_tokens": 50})
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("text_completion", "demo")
    assert body["id"].startswith("cmpl-")
    assert isinstance(body["created"], int)
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": ANSWER,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert engine.tokenizer is not None
    prompt, answer = len(engine.tokenizer.encode("中国")), len(engine.tokenizer.encode(ANSWER)) + 1  # and eos
    assert body["usage"]["prompt_tokens"] == prompt
    assert body["usage"]["completion_tokens"] == answer
    assert body["usage"]["total_tokens"] == prompt + answer
    assert "北京" in response.text, "text must not be escaped"


async def test_prompts_of_each_form_are_answered_in_order(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    engine.answers = {"one": "first", "two": "second"}
    one, two = engine.tokenizer.encode("one"), engine.tokenizer.encode("two")
    for prompt, expected in [
        ("one", ["first"]),
        (["one", "two"], ["first", "second"]),
        (two, ["second"]),
        ([two, one], ["second", "first"]),
    ]:
        body = (await client.post("/v1/completions", json={"prompt": prompt})).json()
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == list(range(len(expected)))


async def test_max_tokens_is_16_unless_said_otherwise(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    await client.post("/v1/completions", json={"prompt": "a"})
    await client.post("/v1/completions", json={"prompt": "a", "max_tokens": None})
    await client.post("/v1/chat/completions", json=HI)
    await client.post("/v1/chat/completions", json=HI | {"max_tokens": 5, "max_completion_tokens": 7})
    assert [params.max_tokens for params in engine.params] == [16, None, None, 7]


async def test_every_sampling_field_reaches_the_engine(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "max_tokens": 9, "ignore_eos": True,
        "stop": ["x"], "stop_token_ids": [5],
    }  # fmt: skip
    response = await client.post("/v1/completions", json={"prompt": "a", **fields})
    assert response.status_code == 200
    params = engine.params[0].to_dict()
    for name, value in fields.items():
        assert params[name] == (tuple(value) if isinstance(value, list) else value)
    whole_numbers = {"temperature": 1, "top_p": 1, "min_p": 0}
    assert (await client.post("/v1/completions", json={"prompt": "a", **whole_numbers})).status_code == 200


async def test_a_stop_string_ends_the_text_and_is_named(client: httpx.AsyncClient) -> None:
    for stream in (False, True):
        asked = {"prompt": "a", "max_tokens": 50, "stop": " capital", "stream": stream}
        response = await client.post("/v1/completions", json=asked)
        choices = [event["choices"][0] for event in events_of(response)] if stream else response.json()["choices"]
        assert "".join(choice["text"] for choice in choices) == "北京 is the"
        assert choices[-1]["finish_reason"] == "stop"
        assert choices[-1]["stop_reason"] == " capital"


async def test_the_length_limit_is_a_finish_reason(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_token_ids_come_back_when_asked_for(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    prompt, answer = engine.tokenizer.encode("a"), engine.tokenizer.encode(ANSWER)
    asked = {"prompt": "a", "max_tokens": 50, "return_token_ids": True}
    (choice,) = (await client.post("/v1/completions", json=asked)).json()["choices"]
    assert choice["prompt_token_ids"] == prompt
    assert choice["token_ids"][:-1] == answer
    choices = [
        event["choices"][0] for event in events_of(await client.post("/v1/completions", json=asked | {"stream": True}))
    ]
    assert choices[0]["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in each for each in choices[1:])
    assert [token for each in choices for token in each["token_ids"]][:-1] == answer


# --- chat ---


async def test_a_chat_completion_has_openais_shape(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    body = (await client.post("/v1/chat/completions", json=HI)).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": ANSWER}
    assert choice["finish_reason"] == "stop"
    assert engine.tokenizer is not None
    assert engine.prompts[0] == engine.tokenizer.apply_chat_template(HI["messages"])


async def test_messages_of_each_role_and_form_reach_the_template(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    messages = [
        {"role": "developer", "content": "short"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "eve"},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None, "annotations": []},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
    ]
    assert (await client.post("/v1/chat/completions", json={"messages": messages})).status_code == 200
    assert engine.tokenizer is not None
    plain = [("system", "short"), ("user", "a\nb"), ("assistant", ""), ("tool", "4")]
    expected = engine.tokenizer.apply_chat_template([{"role": role, "content": text} for role, text in plain])
    assert engine.prompts[0] == expected


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ("hi", "messages"),
        (["hi"], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "wizard", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": "x", "mood": "good"}], "messages[0].mood"),
        ([{"role": "assistant", "content": "x", "tool_calls": [{}]}], "messages[0].tool_calls[0]"),
    ],
)
async def test_a_bad_message_is_a_400_that_names_its_place(
    client: httpx.AsyncClient, messages: object, param: str
) -> None:
    error = error_of(await client.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


# --- streams ---


async def test_a_completion_stream_has_openais_chunks(client: httpx.AsyncClient) -> None:
    asked = {"prompt": "a", "max_tokens": 50, "stream": True}
    events = events_of(await client.post("/v1/completions", json=asked))
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert "".join(event["choices"][0]["text"] for event in events) == ANSWER
    assert not any("\ufffd" in event["choices"][0]["text"] for event in events)
    assert [event["choices"][0]["finish_reason"] for event in events if event["choices"][0]["finish_reason"]] == [
        "stop"
    ]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    assert not any("usage" in event for event in events)


async def test_a_chat_stream_begins_with_the_role(client: httpx.AsyncClient) -> None:
    events = events_of(await client.post("/v1/chat/completions", json=HI | {"stream": True}))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert not any("role" in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == ANSWER
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_usage_comes_last_when_asked_for(client: httpx.AsyncClient) -> None:
    asked = HI | {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = events_of(await client.post("/v1/chat/completions", json=asked))
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    whole = (await client.post("/v1/chat/completions", json=HI)).json()
    assert last["usage"] == whole["usage"]


async def test_several_prompts_stream_side_by_side(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.answers = {"one": "first", "two": "the second"}
    asked = {"prompt": ["one", "two"], "stream": True, "stream_options": {"include_usage": True}}
    events = events_of(await client.post("/v1/completions", json=asked))
    texts, reasons = {0: "", 1: ""}, {0: [], 1: []}
    for event in events[:-1]:
        (choice,) = event["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == {0: "first", 1: "the second"}
    for each in reasons.values():
        assert each[-1] == "stop"
        assert set(each[:-1]) <= {None}
    assert events[-1]["usage"]["completion_tokens"] > 2


async def test_an_error_in_mid_stream_is_sent_as_an_event(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.fail_after = 4
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": True})
    *events, last = events_of(response)
    assert events
    assert last["error"]["message"] == "rank 1 fell over"
    assert not any(event["choices"][0]["finish_reason"] for event in events)
    error = error_of(await client.post("/v1/completions", json={"prompt": "a"}), 500)
    assert error["message"] == "rank 1 fell over"
    assert not engine.open


@pytest.mark.parametrize("stream", [True, False])
async def test_what_fails_before_the_first_token_has_a_status(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    """An over-long prompt must be a 400 that names the limit, not a stream that begins and breaks."""
    asked: dict[str, Any] = {"stream": stream, "max_tokens": 1}
    error = error_of(await client.post("/v1/completions", json=asked | {"prompt": [5] * MAX_MODEL_LEN}), 400)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
    assert str(MAX_MODEL_LEN) in error["message"]
    error = error_of(await client.post("/v1/completions", json=asked | {"prompt": [[5], []]}), 400)
    assert error["param"] == "prompt"
    assert error["message"].startswith("prompt 1: ")
    assert error_of(await client.post("/v1/completions", json=asked | {"prompt": [10**6]}), 400)["param"] == "prompt"
    assert error_of(await client.post("/v1/completions", json=asked | {"prompt": ""}), 400)["param"] == "prompt"
    long_chat = {"messages": [{"role": "user", "content": "ab" * 500}]}
    assert error_of(await client.post("/v1/chat/completions", json=asked | long_chat), 400)["param"] == "prompt"
    engine.raise_at_once = EngineDeadError("the scheduler is gone")
    assert error_of(await client.post("/v1/completions", json=asked | {"prompt": "a"}), 503)["code"] == "engine_dead"
    engine.raise_at_once = EngineError("broken")
    assert error_of(await client.post("/v1/completions", json=asked | {"prompt": "a"}), 500)["type"] == "server_error"
    engine.raise_at_once = ZeroDivisionError("secret detail")
    error = error_of(await client.post("/v1/completions", json=asked | {"prompt": "a"}), 500)
    assert "secret" not in error["message"]


# --- refused ---


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 0), ("echo", "yes"), ("suffix", "x"),
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("prediction", {"type": "content"}),
        ("top_logprobs", 2), ("stream_options", {"include_usage": True}), ("tool_choice", "required"),
        ("made_up_field", 1), ("made_up_field", None), ("prompt_logprobs", 21), ("store", True), ("n", 65), ("n", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_unsupported_field_is_a_400_that_names_it(
    client: httpx.AsyncClient, path: str, field: str, value: object
) -> None:
    body = HI if path == "/v1/chat/completions" else {"prompt": "a"}
    error = error_of(await client.post(path, json=body | {field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]


async def test_defaults_that_clients_send_along_are_accepted(client: httpx.AsyncClient) -> None:
    common = {
        "n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "store": False, "metadata": {"a": "b"},
        "logit_bias": {}, "logprobs": None, "seed": None, "stop": None, "temperature": None, "top_p": None,
        "service_tier": "auto", "repetition_penalty": 1.0, "stream": False, "stream_options": None,
    }  # fmt: skip
    completion = {"best_of": 1, "echo": False, "suffix": None}
    chat = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_logprobs": 0,
    }
    response = await client.post("/v1/completions", json={"prompt": "a", **common, **completion})
    assert response.status_code == 200, response.text
    response = await client.post("/v1/chat/completions", json=HI | common | chat)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("presence_penalty", 2.1), ("frequency_penalty", -3), ("repetition_penalty", 0), ("min_tokens", 17.5),
        ("logit_bias", {"x": 1}), ("logit_bias", {"999999": 1}), ("logit_bias", [1]), ("allowed_token_ids", []),
        ("allowed_token_ids", [10**6]), ("bad_words", [""]), ("bad_words", "no"), ("min_tokens", -1),
        ("logprobs", "1"), ("logprobs", 1.5), ("top_logprobs", 2),
        ("temperature", "hot"), ("temperature", -1), ("temperature", True), ("top_p", 0), ("top_p", 2), ("top_k", 1.5),
        ("top_k", "3"), ("min_p", 2), ("max_tokens", 0), ("max_tokens", "9"), ("max_tokens", 1.0), ("seed", -1),
        ("seed", 2**70), ("ignore_eos", "yes"), ("ignore_eos", 1), ("stop", 5), ("stop", [5]), ("stop", ["a"] * 99),
        ("stop", [""]), ("stop_token_ids", "x"), ("stop_token_ids", ["x"]), ("stop_token_ids", [10**7]),
        ("stream", "yes"), ("model", 5), ("prompt", 5), ("prompt", None), ("prompt", {}), ("prompt", []),
        ("prompt", [1, "a"]), ("prompt", ["a", 1]), ("prompt", [[1], "a"]), ("prompt", [1.5]), ("prompt", [True]),
        ("prompt", ["a"] * 2000), ("stream_options", 5),
    ],
)  # fmt: skip
async def test_a_wrong_value_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, field: str, value: object
) -> None:
    response = await client.post("/v1/completions", json={"prompt": "a", "stream": False} | {field: value})
    param = error_of(response, 400)["param"]
    assert param is not None
    assert param.partition("[")[0] == field


async def test_a_body_that_is_no_json_object_is_a_400(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/json"}
    for content in (
        b"",
        b"[]",
        b"5",
        b"null",
        b"{",
        b'{"prompt": "a"',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000,
    ):
        error_of(await client.post("/v1/completions", content=content, headers=headers), 400)
    error = error_of(await client.post("/v1/completions", content=b'{"prompt": "a"}'), 400)
    assert "Content-Type" in error["message"]
    error = error_of(await client.post("/v1/completions", json={}), 400)
    assert error["param"] == "prompt"
    assert "required" in error["message"]
    nan = b'{"prompt": "a", "temperature": NaN}'
    assert error_of(await client.post("/v1/completions", content=nan, headers=headers), 400)["param"] == "temperature"
    half = b'{"prompt": "\\ud83d"}'
    assert error_of(await client.post("/v1/completions", content=half, headers=headers), 400)["param"] == "prompt"


async def test_unknown_models_routes_and_methods(client: httpx.AsyncClient) -> None:
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", HI)):
        error = error_of(await client.post(path, json=body | {"model": "gpt"}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert "'demo'" in error["message"]
    assert error_of(await client.get("/v1/models/gpt"), 404)["code"] == "model_not_found"
    assert error_of(await client.get("/nowhere"), 404)["code"] == "route_not_found"
    response = await client.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


async def test_a_body_too_large_is_a_413_announced_or_not(client: httpx.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(9):
            yield b" " * 2**20

    headers = {"Content-Type": "application/json"}
    error_of(await client.post("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1), headers=headers), 413)
    error_of(await client.post("/v1/completions", content=pieces(), headers=headers), 413)


async def test_the_key_guards_every_route_but_livez(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path, api_key="sécret")
    async with client_of(engine) as client:
        paths = ["/v1/models", "/health", "/readyz", "/version", "/openapi.json", "/nowhere"]
        for given in ("", "Bearer", "Bearer wrong", "Bearer s", "Basic sécret"):
            headers = {"Authorization": given.encode()} if given else {}
            for path in paths:
                response = await client.get(path, headers=headers)
                assert error_of(response, 401)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
            error_of(await client.post("/v1/completions", json={"prompt": "a"}, headers=headers), 401)
            assert (await client.get("/livez", headers=headers)).status_code == 200
        for given in ("Bearer sécret", "bearer sécret"):
            assert (await client.get("/v1/models", headers={"Authorization": given.encode()})).status_code == 200
    assert not engine.params


# --- the other routes ---


async def test_loading_dead_and_recovering_engines_are_503(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    for code, failure in (("loading", None), ("engine_dead", EngineDeadError("the scheduler died"))):
        engine.is_ready, engine.failure = False, failure
        for path in ("/health", "/readyz"):
            assert error_of(await client.get(path), 503)["code"] == code
        assert error_of(await client.post("/v1/completions", json={"prompt": "a"}), 503)["code"] == code
        assert error_of(await client.post("/v1/chat/completions", json=HI), 503)["code"] == code
        for path in ("/livez", "/version", "/v1/models"):
            assert (await client.get(path)).status_code == 200
    engine.failure, engine.recovering_from = None, WorkerError("rank 1 died", 1)
    for path in ("/health", "/readyz"):
        error = error_of(await client.get(path), 503)
        assert error["code"] == "recovering"
        assert "rank 1 died" in error["message"]
    response = await client.post("/v1/completions", json={"prompt": "a"})
    assert error_of(response, 503)["code"] == "recovering"
    assert response.headers["retry-after"] == "1"
    engine.is_ready, engine.recovering_from = True, None
    for path in ("/health", "/readyz"):
        assert (await client.get(path)).status_code == 200
    assert not engine.params, "a probe queues no work"


async def test_models_and_version(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path, served_model_name="org/name")
    async with client_of(engine) as client:
        body = (await client.get("/v1/models")).json()
        assert body["object"] == "list"
        (card,) = body["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("org/name", "model", MAX_MODEL_LEN)
        assert (await client.get("/v1/models/org/name")).json() == card
        assert (await client.get("/version")).json() == {"version": __version__}
        assert (await client.post("/v1/completions", json={"prompt": "a"})).json()["model"] == "org/name"


async def test_tokenize_and_detokenize_are_inverse(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert engine.tokenizer is not None
    body = (await client.post("/tokenize", json={"prompt": "中国 <|im_end|>", "return_token_strs": True})).json()
    assert body["tokens"] == engine.tokenizer.encode("中国 <|im_end|>")
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == MAX_MODEL_LEN
    back = await client.post("/detokenize", json={"tokens": body["tokens"]})
    assert back.json() == {"prompt": "中国 <|im_end|>"}
    chat = (await client.post("/tokenize", json=HI | {"add_generation_prompt": False})).json()
    assert chat["tokens"] == engine.tokenizer.apply_chat_template(HI["messages"], add_generation_prompt=False)
    error_of(await client.post("/tokenize", json={}), 400)
    error_of(await client.post("/tokenize", json=HI | {"prompt": "x"}), 400)
    for tokens in ([-1], ["a"], "a", [2**40]):
        assert error_of(await client.post("/detokenize", json={"tokens": tokens}), 400)["param"].startswith("tokens")


async def test_without_a_tokenizer_ids_go_in_and_out_and_text_is_refused(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    tokenizer, engine.tokenizer = engine.tokenizer, None
    async with client_of(engine) as client:
        for path, body in (
            ("/v1/completions", {"prompt": "a"}),
            ("/v1/chat/completions", HI),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert "skip_tokenizer_init" in error_of(await client.post(path, json=body), 400)["message"]
    assert tokenizer is not None


async def test_the_openapi_document_is_complete(client: httpx.AsyncClient) -> None:
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/tokenize"} <= set(paths)
