"""`/generate`, `/abort` and `/load`: token ids in and out, and requests that are ended by their ids."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from launch.server.app import create_app
from tests.launch.fake_engine import ANSWER, FakeEngine
from tests.launch.server_process import ServerProcess

LONG = {"prompt_token_ids": [5, 6, 7], "sampling_params": {"ignore_eos": True, "max_tokens": 3000}, "stream": True}


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path)


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


# --- over the demo model, with two front ends ---


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ServerProcess("--api-server-count", "2") as server:
        yield server.wait_ready()


class Open:
    """A stream that is read in a thread; `events` are what came so far."""

    def __init__(self, url: str, path: str, asked: dict[str, Any], request_id: str) -> None:
        self.events: list[str] = []
        self._thread = threading.Thread(target=self._read, args=(url + path, asked, request_id))
        self._thread.start()
        self.until(1)

    def _read(self, url: str, asked: dict[str, Any], request_id: str) -> None:
        headers = {"X-Request-Id": request_id}
        with httpx.stream("POST", url, json=asked, headers=headers, timeout=30) as response:
            self.events.extend(line for line in response.iter_lines() if line)

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 15
        while len(self.events) < count:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> str:
        """How it ended, soon."""
        self._thread.join(5)
        assert not self._thread.is_alive(), "it was not ended"
        assert self.events[-1] == "data: [DONE]"
        last = json.loads(self.events[-2].removeprefix("data: "))
        reason: str = (last.get("choices") or last.get("outputs"))[0]["finish_reason"]
        return reason


def load(url: str) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{url}/load").json()
    assert found["server_load"] == found["running"] + found["waiting"]
    return found


def test_requests_are_ended_by_their_ids_wherever_they_are(url: str) -> None:
    """Each connection goes to one of two front ends, and so does the abort."""
    chat = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "max_tokens": 3000, "stream": True}
    texts = {"prompt": ["a", "b"], "ignore_eos": True, "max_tokens": 3000, "stream": True}
    opened = {f"id-{number}": Open(url, "/generate", LONG, f"id-{number}") for number in range(6)}
    opened["chat"], opened["texts"] = (
        Open(url, "/v1/chat/completions", chat, "chat"),
        Open(url, "/v1/completions", texts, "texts"),
    )
    assert {load(url)["running"] for _ in range(20)} != {0}
    assert httpx.post(f"{url}/abort", json={"request_id": "nobody"}).json() == {"aborted": []}
    assert httpx.post(f"{url}/abort", json={"request_id": "gen-id-0"}).status_code == 200
    assert opened.pop("id-0").end() == "abort"
    assert httpx.post(f"{url}/abort", json={"request_id": ["id-1", "chat", "texts"]}).status_code == 200
    assert [opened.pop(name).end() for name in ("id-1", "chat", "texts")] == ["abort"] * 3
    for stream in opened.values():  # the others go on
        stream.until(len(stream.events) + 5)
    assert httpx.post(f"{url}/abort", json={"abort_all": True}).status_code == 200
    assert [stream.end() for stream in opened.values()] == ["abort"] * 4
    assert all(load(url)["server_load"] == 0 for _ in range(10))
    answer = httpx.post(
        f"{url}/generate", json={"input_ids": [5], "sampling_params": {"max_tokens": 2, "ignore_eos": True}}
    )
    assert len(answer.json()["outputs"][0]["token_ids"]) == 2


def test_an_id_that_is_in_use_is_refused(url: str) -> None:
    with httpx.stream("POST", f"{url}/generate", json=LONG, headers={"X-Request-Id": "twice"}) as first:
        lines = first.iter_lines()
        next(lines)
        asked = {"json": {"input_ids": [1]}, "headers": {"X-Request-Id": "twice"}}
        # Each connection goes to one of two front ends, and one of them has it open.
        answers = [httpx.post(f"{url}/generate", **asked) for _ in range(20)]
        refused = [answer.json()["error"] for answer in answers if answer.status_code != 200]
    assert refused
    assert all((error["param"], "still runs" in error["message"]) == ("request_id", True) for error in refused)
