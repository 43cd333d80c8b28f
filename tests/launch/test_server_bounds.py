"""What a client may not do: headers, bodies and nesting without end, and being slower than anybody waits."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import pytest

from launch.server.bodies import MAX_DEPTH
from launch.server.middleware import MAX_BODY_BYTES, MAX_HEADER_BYTES
from tests.launch.fake_engine import ANSWER, FakeEngine

JSON = {"Content-Type": "application/json"}


def error_of(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()["error"]
    return error


@pytest.mark.parametrize("opening", [b"[", b'{"prompt":', b'{"prompt":[[', b'[{"a":'])
@pytest.mark.parametrize("count", [100_000, 1500, 300])
def test_a_body_nested_without_end_is_a_400_in_milliseconds(url: str, opening: bytes, count: int) -> None:
    begun = time.perf_counter()
    error = error_of(httpx.post(f"{url}/v1/completions", content=opening * count, headers=JSON), 400)
    assert time.perf_counter() - begun < 1
    assert "64 levels deep" in error["message"]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
def test_nesting_has_a_limit_also_where_it_is_closed(url: str, route: str) -> None:
    def nested(depth: int) -> bytes:
        return b'{"prompt": "a", "unknown": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert (
        "levels deep" in error_of(httpx.post(url + route, content=nested(MAX_DEPTH + 1), headers=JSON), 400)["message"]
    )
    # One level less is judged as any other body.
    assert (
        "levels deep" not in error_of(httpx.post(url + route, content=nested(MAX_DEPTH), headers=JSON), 400)["message"]
    )


def test_many_brackets_that_are_not_deep_are_fine(url: str) -> None:
    asked = {"prompt": "[[[{{{" * 20, "stop": ["]" * 30]}
    assert httpx.post(f"{url}/v1/completions", json=asked | {"max_tokens": 50}).json()["choices"][0]["text"] == ANSWER
    several = {"prompt": [[65]] * 100, "max_tokens": 1}
    assert len(httpx.post(f"{url}/v1/completions", json=several).json()["choices"]) == 100


def test_json_that_only_the_slower_parser_takes_is_taken(url: str) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 50}).encode("utf-16")
    assert httpx.post(f"{url}/v1/completions", content=body, headers=JSON).status_code == 200
    error = error_of(httpx.post(f"{url}/v1/completions", content=b'{"prompt": "a\\ud800"}', headers=JSON), 400)
    assert "Unicode" in error["message"] or "surrogate" in error["message"]


@pytest.mark.parametrize("field", ["max_tokens", "top_k", "seed", "n", "prompt"])
@pytest.mark.parametrize("digits", [20, 400, 5000])
def test_a_number_without_end_is_a_400(url: str, field: str, digits: int) -> None:
    """Whatever reads it, shows it or sends it on."""
    fields = {"prompt": '"a"', field: "1" * digits}
    body = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"
    assert error_of(httpx.post(f"{url}/v1/completions", content=body, headers=JSON), 400)["message"]
    text = json.dumps({"prompt": "a", "stop": ["7" * 1000], "user": "7" * digits})
    assert httpx.post(f"{url}/v1/completions", content=text, headers=JSON).status_code == 200


def test_headers_have_a_limit(url: str) -> None:
    most = {"X-Filler": "x" * (MAX_HEADER_BYTES - 1024)}
    assert httpx.get(f"{url}/livez", headers=most).status_code == 200
    error = error_of(httpx.get(f"{url}/livez", headers={"X-Filler": "x" * MAX_HEADER_BYTES}), 431)
    assert f"at most {MAX_HEADER_BYTES} bytes" in error["message"]
    many = [(f"X-{number}", "y" * 40) for number in range(1000)]
    assert httpx.get(f"{url}/livez", headers=many).status_code in (400, 431)


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    connection = socket.create_connection((str(address.hostname), int(address.port or 0)))
    connection.settimeout(15)
    return connection


def ask(connection: socket.socket) -> None:
    """A whole request, and its whole answer."""
    connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        answer += connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 200")


def test_headers_that_never_end_are_cut_off(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
        answer = b""
        try:
            for _ in range(200):
                connection.sendall(b"X-Filler: " + b"x" * 1000 + b"\r\n")
            while piece := connection.recv(4096):
                answer += piece
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert not answer or answer.startswith(b"HTTP/1.1 400")


def test_a_client_that_sends_its_headers_slowly_is_dropped(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few thousand idle sockets keep everybody else out."""
    with connect(url) as kept:
        ask(kept)
        monkeypatch.setattr("launch.server.protocol.HEADER_SECONDS", 0.3)
        with connect(url) as mute, connect(url) as slow:
            slow.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n")
            assert mute.recv(4096) == b""
            assert slow.recv(4096) == b""
        # One that was served is left alone until it begins the next request, and then has as long again.
        ask(kept)
        kept.sendall(b"GET /livez")
        assert kept.recv(4096) == b""


def test_a_body_that_trickles_in_is_a_408(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.server.middleware.BODY_SECONDS", 0.3)
    with connect(url) as connection:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        )
        connection.sendall(head + b'{"prompt"')
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer.lower()


def test_a_long_answer_outlasts_the_limit_of_a_body(
    engine: FakeEngine, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.server.middleware.BODY_SECONDS", 0.5)
    engine.delay = 0.05
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200


def test_a_body_too_large_closes_nothing_but_itself(url: str) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**20 + 1):
            yield b" " * 2**20

    error_of(httpx.post(f"{url}/v1/completions", content=pieces(), headers=JSON), 413)
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}).status_code == 200


# --- ids ---


async def test_each_answer_has_a_request_id_and_so_do_its_choices(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as client:
        given = {"X-Request-Id": "my-id:1"}
        response = await client.post("/v1/completions", json={"prompt": "a"}, headers=given)
        assert response.headers["x-request-id"] == "my-id:1"
        assert response.json()["id"] == "cmpl-my-id:1"
        chat = {"messages": [{"role": "user", "content": "a"}], "stream": True}
        response = await client.post("/v1/chat/completions", json=chat, headers=given)
        assert json.loads(response.text.splitlines()[0].removeprefix("data: "))["id"] == "chatcmpl-my-id:1"
        drawn = [(await client.get("/livez")).headers["x-request-id"] for _ in range(2)]
        assert drawn[0] != drawn[1]
        for path, status in (("/nowhere", 404), ("/v1/completions", 405)):
            assert (await client.get(path, headers=given)).headers["x-request-id"] == "my-id:1", status


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a\tb", "é", '"', "a/b"])
def test_an_impossible_request_id_is_a_400(url: str, bad: str) -> None:
    response = httpx.get(f"{url}/livez", headers={"X-Request-Id": bad.encode()})
    assert error_of(response, 400)["param"] == "X-Request-Id"
    assert response.headers["x-request-id"] != bad


def test_an_internal_error_tells_its_request_id(engine: FakeEngine, url: str) -> None:
    """It is what a user sends to whoever reads the log."""
    engine.raise_at_once = ZeroDivisionError("a fault of ours")
    response = httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, headers={"X-Request-Id": "abc"})
    assert "fault" not in error_of(response, 500)["message"]
    assert response.headers["x-request-id"] == "abc"
