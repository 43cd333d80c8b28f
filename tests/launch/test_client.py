"""The client of the terminal chat and the load generator, against bytes written down: events, errors, connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from configs.errors import ConfigError, UnknownModelError
from launch.client import events
from launch.client.api import ApiClient
from launch.client.connection import ClientError
from launch.client.events import EventParser
from tests.launch.scripted_server import (
    MODELS,
    Hangup,
    ScriptedServer,
    event,
    json_answer,
    piece,
    stream_head,
    streamed,
    tokens,
    usage,
)

STREAM = (
    "\ufeffdata: one\n\n"
    ": a comment\n\n"
    "event: message\r\nid: 7\r\nretry: 3\r\ndata: two 北京\r\ndata:and more\r\n\r\n"
    "data\n\n"
    "data: three\r\r"
    "data:  indented\n\n"
    "nothing: here\n\n"
    "data: never ended\n"
)
EXPECTED = ["one", "two 北京\nand more", "", "three", " indented"]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_events_may_be_cut_anywhere(size: int) -> None:
    """Also inside a character, and between the two bytes of a line's end."""
    parser, data = EventParser(), STREAM.encode()
    found = [text for start in range(0, len(data), size) for text in parser.feed(data[start : start + size])]
    assert found == EXPECTED


def test_the_id_of_an_event_counts_once_the_event_is_complete() -> None:
    parser, seen = EventParser(), []
    for each in (
        b"id: a:0\ndata: x\n",
        b"\n",
        b"data: y\n\n",
        b"id: a\x001\ndata: z\n\n",
        b"id:a:2\r\n",
        b"data:\r\n\r\n",
    ):
        parser.feed(each)
        seen.append(parser.last_id)
    assert seen == ["", "a:0", "a:0", "a:0", "a:0", "a:2"]


def test_an_event_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "MAX_EVENT_BYTES", 100)
    for piece_ in (b"x" * 60, b"data: 1\n" * 8):
        parser = EventParser()
        parser.feed(piece_)
        with pytest.raises(ValueError, match="larger than 100 bytes"):
            parser.feed(piece_)


async def ask(script: Any, *, key: str | None = None) -> tuple[list[dict[str, Any]], ScriptedServer]:
    server = ScriptedServer(script)
    async with server.serve() as url:
        api = ApiClient(url + "/v1", key)
        try:
            return [chunk async for chunks in api.stream("/v1/completions", {"a": 1}) for chunk in chunks], server
        finally:
            api.close()


async def test_a_stream_is_read_to_its_end() -> None:
    chunks, server = await ask(lambda *_: streamed(tokens("a"), tokens("b", "stop"), usage(1, 2)), key="secret")
    assert [chunk["choices"][0]["text"] for chunk in chunks[:2]] == ["a", "b"]
    assert chunks[2]["usage"]["completion_tokens"] == 2
    assert server.bodies == [{"a": 1, "stream": True}]
    assert "Authorization: Bearer secret\r\n" in server.heads[0]


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        ([stream_head(), event(tokens("a")), piece(b"")], "cut off", "without"),
        ([stream_head(), event(tokens("a"))], "connection lost", "127.0.0.1:"),
        ([stream_head(), event({"error": {"message": "rank 1", "code": 503}})], "error event", "rank 1"),
        ([stream_head(), event({"object": "error", "message": "old vLLM"})], "error event", "old vLLM"),
        ([stream_head(), event("{not json")], "bad answer", "no JSON object"),
        ([stream_head(), piece(b"data: \xff\n\n")], "bad answer", "unreadable"),
        ([json_answer({"choices": []})], "bad answer", "does not stream"),
        ([json_answer({"error": {"message": "full"}}, "429 Too Many")], "HTTP 429", "full"),
        ([json_answer({"object": "error", "message": "long"}, "400 Bad")], "HTTP 400", "long"),
        ([json_answer({"detail": "?"}, "422 X")], "HTTP 422", "detail"),
        ([b"HTTP/1.1 500 X\r\ncontent-length: 4\r\n\r\noops"], "HTTP 500", "oops"),
        ([b"SSH-2.0-OpenSSH\r\n"], "connection lost", "127.0.0.1:"),
        ([], "connection lost", "127.0.0.1:"),
    ],
)
async def test_every_failure_has_a_kind(answer: list[bytes], kind: str, message: str) -> None:
    def script(*_: Any) -> Iterator[bytes]:
        yield from answer
        raise Hangup

    with pytest.raises(ClientError, match=message) as caught:
        await ask(script)
    assert caught.value.kind == kind


async def test_a_connection_is_kept_and_a_stale_one_replaced() -> None:
    def script(number: int, *_: Any) -> Iterator[bytes]:
        yield from streamed(tokens("a"))
        if number == 1:
            raise Hangup

    server = ScriptedServer(script)
    async with server.serve() as url:
        api = ApiClient(url)
        for expected in (1, 1, 2, 2):
            assert [chunk async for chunk in api.stream("/v1/completions", {})]
            assert server.connections == expected
        api.close()


async def test_a_failed_request_is_not_sent_again() -> None:
    """Only where the server cannot have begun on it: nothing came, on a connection that was kept."""

    def script(number: int, *_: Any) -> Iterator[bytes]:
        yield stream_head()
        raise Hangup

    server = ScriptedServer(script)
    async with server.serve() as url:
        api = ApiClient(url)
        with pytest.raises(ClientError):
            [chunk async for chunk in api.stream("/v1/completions", {})]
        api.close()
    assert len(server.bodies) == 1


async def test_models() -> None:
    server = ScriptedServer(lambda *_: json_answer(MODELS))
    async with server.serve() as url:
        api = ApiClient(url + "/behind/a/proxy/v1/")
        assert (await api.model())["id"] == "first"
        assert (await api.model("second"))["id"] == "second"
        with pytest.raises(UnknownModelError, match="'third'; it has: first, second"):
            await api.model("third")
        api.close()
    assert set(server.paths) == {"/behind/a/proxy/v1/models"}
    other = ScriptedServer(lambda *_: json_answer({"models": []}))
    async with other.serve() as url:
        api = ApiClient(url)
        with pytest.raises(ClientError, match="as OpenAI does"):
            await api.model()
        api.close()
    with pytest.raises(ClientError, match="cannot reach") as caught:
        await ApiClient("http://127.0.0.1:1").model()
    assert caught.value.kind == "connect"


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://x", "http://", "http://x:99999999", "http://[::1"])
def test_an_impossible_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url must be like"):
        ApiClient(url)
