"""Asking the server over an invented engine without a socket, and reading its errors and events."""

from __future__ import annotations

import json
from typing import Any

import httpx

from launch.server.app import create_app
from tests.launch.fake_engine import FakeEngine

HI = {"messages": [{"role": "user", "content": "hi"}]}


def client_of(engine: FakeEngine) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_app(engine), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error that an answer of this status holds, in OpenAI's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a whole stream but for the last, which must be `[DONE]`."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]
