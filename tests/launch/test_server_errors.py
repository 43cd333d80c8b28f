"""Each error over a bare connection: its status, headers and body; and fields that go together or do not."""

from __future__ import annotations

import http.client
import itertools
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from configs.errors import CapacityError, EngineDeadError, EngineError, RequestTimeoutError
from launch.server.middleware import MAX_BODY_BYTES
from tests.launch.fake_engine import FakeEngine
from tests.launch.http_answers import client_of, error_of, events_of

KEY = "sécret"


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path, api_key=KEY)


def send(
    url: str, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Status, headers and JSON of an answer."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    sent = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, data, {name: value.encode() for name, value in sent.items()})  # type: ignore[arg-type]
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, {name.lower(): value for name, value in response.getheaders()}, answer


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CASES = [
    ("POST", COMPLETIONS, {"prompt": "a", "temperature": -1}, 400, "temperature", None),
    ("POST", COMPLETIONS, {"prompt": "a", "suffix": "b"}, 400, "suffix", "unsupported"),
    ("POST", COMPLETIONS, {"prompt": "a", "made_up": 1}, 400, "made_up", None),
    ("POST", COMPLETIONS, {"prompt": "a " * 5000}, 400, None, None),
    ("POST", COMPLETIONS, {"prompt": "a", "best_of": 2, "stream": True}, 400, "best_of", None),
    ("POST", COMPLETIONS, {}, 400, "prompt", "missing_required_parameter"),
    ("POST", COMPLETIONS, b"{", 400, None, None),
    ("POST", CHAT, {"messages": []}, 400, "messages", None),
    ("POST", CHAT, {"messages": HI, "tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", None),
    ("POST", CHAT, {"messages": HI, "modalities": ["audio"]}, 400, "modalities", "unsupported"),
    ("POST", CHAT, {"messages": HI, "model": "gpt"}, 404, "model", "model_not_found"),
    ("GET", "/v1/models/gpt", None, 404, "model", "model_not_found"),
    ("GET", "/v1/streams/gone", None, 404, None, "stream_not_found"),
    ("GET", "/nowhere", None, 404, None, "route_not_found"),
    ("POST", "/v1/embeddings", {"input": "a"}, 501, None, "not_implemented"),
    ("POST", "/v1/responses", {"input": "a"}, 501, None, "not_implemented"),
    ("DELETE", "/v1/files/1", None, 501, None, "not_implemented"),
    ("GET", CHAT, None, 405, None, "method_not_allowed"),
    ("POST", CHAT, b" " * (MAX_BODY_BYTES + 1), 413, None, "body_too_large"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "param", "code"), CASES)
def test_a_refused_request(
    engine: FakeEngine, url: str, method: str, path: str, body: object, status: int, param: str, code: str | None
) -> None:
    got, headers, answer = send(url, method, path, body)
    assert (got, set(answer), headers["content-type"]) == (status, {"error"}, "application/json")
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if param is not None:
        assert error["param"] == param
    if code is not None:
        assert error["code"] == code
    assert not engine.params


def test_what_the_server_cannot_do_now(engine: FakeEngine, url: str) -> None:
    asked = {"prompt": "a"}
    status, headers, answer = send(url, "POST", COMPLETIONS, asked, Authorization="Bearer wrong")
    assert (status, headers["www-authenticate"], answer["error"]["code"]) == (401, "Bearer", "invalid_api_key")
    engine.queue_is_full = True
    status, headers, answer = send(url, "POST", COMPLETIONS, asked)
    assert (status, answer["error"]["code"]) == (429, "queue_full")
    assert int(headers["retry-after"]) >= 1
    engine.queue_is_full = False
    for error, expected in (
        (CapacityError("it can never fit"), 400),
        (RequestTimeoutError("too slow"), 504),
        (EngineDeadError("it died"), 503),
        (EngineError("it fell over"), 500),
        (ValueError("a fault that is not shown"), 500),
    ):
        engine.raise_at_once = error
        for stream in (False, True):
            status, headers, answer = send(url, "POST", COMPLETIONS, asked | {"stream": stream})
            assert status == expected
            assert ("retry-after" in headers) == (status == 503)
            assert "not shown" not in answer["error"]["message"]
    engine.is_ready = False
    status, headers, answer = send(url, "POST", CHAT, {"messages": HI})
    assert (status, answer["error"]["code"]) == (503, "loading")
    assert int(headers["retry-after"]) >= 1


FORMS = ("a", ["a", "b"], [65, 66], [[65, 66], [67]])


@pytest.mark.parametrize(("prompt", "n"), list(itertools.product(FORMS, (1, 2))))
async def test_a_stream_adds_up_to_the_whole_answer(tmp_path: Path, prompt: object, n: int) -> None:
    """Whatever is asked for together: prompts of each form, echo, n, log-probabilities and ids."""
    engine = FakeEngine(tmp_path)
    async with client_of(engine) as client:
        for echo, logprobs, ids, length in itertools.product((False, True), (None, 2), (False, True), (4, 60)):
            asked = {
                "prompt": prompt, "n": n, "echo": echo, "logprobs": logprobs, "return_token_ids": ids,
                "max_tokens": length,
            }  # fmt: skip
            whole = (await client.post(COMPLETIONS, json=asked)).json()
            events = events_of(await client.post(COMPLETIONS, json=asked | {"stream": True}))
            assert len(whole["choices"]) == n * (2 if prompt in (FORMS[1], FORMS[3]) else 1)
            for choice in whole["choices"]:
                parts = [each for event in events for each in event["choices"] if each["index"] == choice["index"]]
                assert "".join(each["text"] for each in parts) == choice["text"]
                assert [each["finish_reason"] for each in parts if each["finish_reason"]] == [choice["finish_reason"]]
                if ids:
                    assert [token for each in parts for token in each["token_ids"]] == choice["token_ids"]
                if logprobs is not None:
                    for name, told in choice["logprobs"].items():
                        assert [each for part in parts for each in (part["logprobs"] or {}).get(name, [])] == told


async def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path)
    async with client_of(engine) as client:
        for fields, param in (
            ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
            ({"best_of": 1, "n": 2}, "best_of"),
            ({"prompt": ["a"] * 1024, "n": 17}, "n"),
            ({"suffix": "b"}, "suffix"),
            ({"tools": [{}]}, "tools"),
            ({"use_beam_search": True, "stream": True}, "stream"),
        ):
            asked = {"prompt": "a"} | fields
            assert error_of(await client.post(COMPLETIONS, json=asked), 400)["param"] == param, fields
        for fields, param in (
            ({"tools": []}, "tools"),
            ({"add_generation_prompt": False}, "add_generation_prompt"),
            ({"messages": HI}, "messages"),
        ):
            error = error_of(await client.post("/tokenize", json={"prompt": "a"} | fields), 400)
            assert error["param"] in (param, "prompt", "messages")
        assert (await client.post(COMPLETIONS, json={"prompt": "a", "suffix": None})).status_code == 200
