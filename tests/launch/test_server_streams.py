"""Streams: signs of life, counts on the way, and streams that are read again, without a token lost or repeated."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import Request

from launch.server.errors import ApiError
from launch.server.streams import KeptStream, StreamStore
from tests.launch.fake_engine import FakeEngine, served
from tests.launch.http_answers import HI, client_of, error_of, events_of
from tests.waiting import until

RESUME = {"X-Stream-Resume": "1"}
ASKED = {"prompt": "a", "stream": True, "max_tokens": 60}
TEXT = "word " * 11


def ids_of(text: str) -> list[str]:
    return re.findall(r"^id: (.*)$", text, re.MULTILINE)


def text_of(body: str) -> str:
    lines = [line[6:] for line in body.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for line in lines for choice in json.loads(line)["choices"])


async def test_every_event_behind_a_given_one_comes_again_byte_for_byte(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        body = ASKED | {"n": 2, "stream_options": {"include_usage": True}}
        whole = (await client.post("/v1/completions", json=body, headers=RESUME)).text
        events, ids = [each + "\n\n" for each in whole.split("\n\n")[:-1]], ids_of(whole)
        stream_id = ids[0].rpartition(":")[0]
        assert ids == [f"{stream_id}:{number}" for number in range(len(events))]
        assert json.loads(events[0].partition("data: ")[2])["id"] == stream_id
        assert events[-1].endswith("data: [DONE]\n\n")
        path = f"/v1/streams/{stream_id}"
        assert (await client.get(path)).text == whole
        for number in (0, 3, len(events) - 2):
            response = await client.get(path, headers={"Last-Event-ID": ids[number]})
            assert response.headers["content-type"].startswith("text/event-stream")
            assert response.text == "".join(events[number + 1 :])
            assert (await client.get(path, params={"last_event_id": ids[number]})).text == response.text
        assert (await client.get(path, headers={"Last-Event-ID": ids[-1]})).status_code == 204
        for bad in ("5", f"{stream_id}:{len(events)}", f"{stream_id}:-1", "cmpl-other:0", f"{stream_id}:1x"):
            error = error_of(await client.get(path, headers={"Last-Event-ID": bad}), 400)
            assert error["param"] == "Last-Event-ID"
    assert len(engine.prompts) == 1


async def test_who_has_no_stream_gets_none(engine: FakeEngine, tmp_path: Path) -> None:
    async with client_of(engine) as client:
        assert error_of(await client.get("/v1/streams/cmpl-gone"), 404)["code"] == "stream_not_found"
        for headers, body in (({"X-Stream-Resume": "yes"}, ASKED), (RESUME, ASKED | {"stream": False})):
            error = error_of(await client.post("/v1/completions", json=body, headers=headers), 400)
            assert error["param"] == "X-Stream-Resume"
        plain = (await client.post("/v1/completions", json=ASKED, headers={"X-Stream-Resume": "0"})).text
        assert not ids_of(plain)
        stream_id = json.loads(plain.split("\n\n")[0][6:])["id"]
        error_of(await client.get(f"/v1/streams/{stream_id}"), 404)
        bad = ASKED | {"temperature": -1}
        error_of(await client.post("/v1/completions", json=bad, headers=RESUME), 400)
        engine.raise_at_once = RuntimeError("odd")
        error_of(await client.post("/v1/completions", json=ASKED, headers=RESUME), 500)
    guarded = FakeEngine(tmp_path / "guarded", api_key="k")
    async with client_of(guarded) as client:
        headers = RESUME | {"Authorization": "Bearer k"}
        stream_id = (await client.post("/v1/completions", json=ASKED, headers=headers)).headers["x-stream-id"]
        error_of(await client.get(f"/v1/streams/{stream_id}"), 401)
        assert (await client.get(f"/v1/streams/{stream_id}", headers=headers)).status_code == 200


async def test_a_stream_that_fails_is_told_so_again(engine: FakeEngine) -> None:
    engine.fail_after = 3
    async with client_of(engine) as client:
        response = await client.post("/v1/completions", json=ASKED, headers=RESUME)
        assert "rank 1 fell over" in response.text
        assert response.text.endswith("data: [DONE]\n\n")
        stream_id = response.headers["x-stream-id"]
        again = await client.get(f"/v1/streams/{stream_id}", headers={"Last-Event-ID": f"{stream_id}:0"})
        assert response.text.endswith(again.text)
        assert "rank 1 fell over" in again.text


def read_some(url: str, num_events: int, extra: Mapping[str, str] | None = None) -> list[str]:
    """The first events of a stream, whose client hangs up then."""
    events: list[str] = []
    headers = RESUME | dict(extra or {})
    with httpx.stream("POST", f"{url}/v1/completions", json=ASKED, headers=headers) as response:
        for piece in response.iter_text():
            events += [each + "\n\n" for each in piece.split("\n\n") if each]
            if len(events) >= num_events:
                return events
    raise AssertionError("the stream ended early")


def test_a_reader_that_hangs_up_misses_nothing(engine: FakeEngine, url: str) -> None:
    engine.answers, engine.held_after = {"a": TEXT}, 6
    begun = read_some(url, 4)
    last = ids_of(begun[-1])[-1]
    assert engine.open
    engine.held_after = None
    headers = {"Last-Event-ID": last}
    rest = httpx.get(f"{url}/v1/streams/{last.rpartition(':')[0]}", headers=headers, timeout=20).text
    assert text_of("".join(begun) + rest) == TEXT
    ids = ids_of("".join(begun) + rest)
    assert [int(each.rpartition(":")[2]) for each in ids] == list(range(len(ids)))
    assert not engine.aborted


def test_a_stream_whose_reader_stays_away_is_aborted(tmp_path: Path) -> None:
    engine = FakeEngine(tmp_path, stream_resume_seconds=1.0)
    engine.answers, engine.held_after = {"a": TEXT * 2}, 3
    with served(engine) as url:
        begun = read_some(url, 1)
        until(lambda: engine.aborted)
        engine.held_after = None
        stream_id = ids_of(begun[0])[0].rpartition(":")[0]
        assert httpx.get(f"{url}/v1/streams/{stream_id}").status_code == 404
        done = httpx.post(f"{url}/v1/completions", json=ASKED | {"max_tokens": 1}, headers=RESUME)
        path = f"{url}/v1/streams/{done.headers['x-stream-id']}"
        assert httpx.get(path).status_code == 200
        until(lambda: httpx.get(path).status_code == 404)


def test_the_latest_reader_has_the_stream(engine: FakeEngine, url: str) -> None:
    engine.answers, engine.held_after = {"a": TEXT}, 5
    with httpx.stream("POST", f"{url}/v1/completions", json=ASKED, headers=RESUME) as older:
        pieces = older.iter_text()
        begun = next(pieces)
        with httpx.stream("GET", f"{url}/v1/streams/{older.headers['x-stream-id']}", timeout=30) as later:
            pieces_again = later.iter_text()
            newer = next(pieces_again)
            engine.held_after = None
            newer += "".join(pieces_again)
        left = begun + "".join(pieces)
    assert text_of(newer) == TEXT
    assert newer.startswith(left)
    assert "[DONE]" not in left


def request_of(key: str = "") -> Request:
    return Request({"type": "http", "headers": [(b"authorization", key.encode())]})


async def endless(size: int, gate: asyncio.Event) -> AsyncGenerator[list[bytes], None]:
    while True:
        yield [b"x" * size]
        await asyncio.sleep(0)
        await gate.wait()


async def finite(number: int, size: int) -> AsyncGenerator[list[bytes], None]:
    for _ in range(number):
        yield [b"x" * size]


async def until_done(stream: KeptStream) -> None:
    for _ in range(100):
        await asyncio.sleep(0)
    assert stream.done


async def failing() -> AsyncGenerator[list[bytes], None]:
    raise ApiError(429, "the queue is full")
    yield []


async def test_a_stream_that_was_refused_may_be_asked_for_again_under_its_id() -> None:
    """It was kept without an event, and a client that came again, as Retry-After says, got a 409."""
    store = StreamStore(60)
    refused = store.start(request_of(), "one", failing())
    with pytest.raises(ApiError, match="the queue is full"):
        await anext(refused.read(0))
    assert len(store) == 0
    again = store.start(request_of(), "one", finite(1, 10))
    assert [batch async for batch in again.read(0)] == [[b"id: one:0\n" + b"x" * 10]]


async def test_kept_events_are_bounded() -> None:
    store, gate = StreamStore(60, max_bytes=10_000, max_streams=2), asyncio.Event()
    ended = store.start(request_of(), "one", finite(5, 1000))
    await until_done(ended)
    gate.set()
    running = store.start(request_of(), "two", endless(1000, gate))
    for _ in range(300):
        await asyncio.sleep(0)
    assert running.end > 50
    gate.clear()
    assert len(store) == 1, "what has ended goes first"
    assert ended.size + running.size <= 20_000
    assert not running.has(0)
    assert running.has(running.end)
    with pytest.raises(ApiError) as gone:
        await anext(running.read(0))
    assert gone.value.status == 404
    for stream_id, status in (("two", 409), ("three", None), ("four", 429)):
        if status is None:
            store.start(request_of(), stream_id, endless(1, gate))
            continue
        with pytest.raises(ApiError) as refused:
            store.start(request_of(), stream_id, finite(1, 1))
        assert refused.value.status == status
    with pytest.raises(ApiError):
        store.find(request_of("another key"), "two")
    for stream_id in ("two", "three"):
        store.forget(store.find(request_of(), stream_id))
    assert not len(store)


@pytest.mark.parametrize("headers", [{}, RESUME])
def test_a_silent_stream_gives_signs_of_life(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr("launch.server.events.PING_SECONDS", 0.05)
    engine.answer, engine.delay = "a b", 0.2
    body = httpx.post(f"{url}/v1/completions", json=ASKED | {"max_tokens": 3}, headers=headers).text
    assert body.count(": ping\n") >= 3
    assert text_of(body) == "a b"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", default_headers=headers) as client:
        chunks = client.completions.create(model="demo", prompt="a", max_tokens=3, stream=True)
        assert "".join(chunk.choices[0].text for chunk in chunks) == "a b"
    monkeypatch.setattr("launch.server.events.PING_SECONDS", 30)
    engine.delay = 0.0
    assert "ping" not in httpx.post(f"{url}/v1/completions", json=ASKED).text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_counts_come_with_every_chunk_where_they_are_asked_for(engine: FakeEngine, path: str) -> None:
    asked = (HI if "chat" in path else {"prompt": "a", "max_tokens": 60}) | {"stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    async with client_of(engine) as client:
        events = events_of(await client.post(path, json=asked | {"stream_options": options}))
        counts = [event["usage"]["completion_tokens"] for event in events]
        assert counts == sorted(counts)
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == counts[-1] > 5
        plain = {"include_usage": True, "continuous_usage_stats": False}
        events = events_of(await client.post(path, json=asked | {"stream_options": plain}))
        assert {json.dumps(event["usage"]) for event in events[:-1]} == {"null"}
        bad = {"continuous_usage_stats": True}
        error = error_of(await client.post(path, json=asked | {"stream_options": bad}), 400)
        assert error["param"] == "stream_options.continuous_usage_stats"


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["a", "b"], "n": 2}])
async def test_each_index_ends_once(engine: FakeEngine, fields: dict[str, Any]) -> None:
    async with client_of(engine) as client:
        events = events_of(await client.post("/v1/completions", json=ASKED | fields))
        choices = [choice for event in events for choice in event["choices"]]
        ends = [choice["index"] for choice in choices if choice["finish_reason"]]
        assert sorted(ends) == sorted({choice["index"] for choice in choices})
