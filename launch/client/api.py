"""OpenAI's API as a client sees it: the models, and answers as streams of JSON objects; knows no terminal, no clock.

An error is a `ClientError` whichever way the server tells it: as a status, as an event of a stream, by hanging up.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from configs.errors import UnknownModelError
from launch.client.connection import ClientError, HttpClient, Response
from launch.client.events import EventParser

MAX_ANSWER_BYTES = 16 * 2**20
_DONE = "[DONE]"


class ApiClient:
    """The server at `base_url`, with or without /v1. Belongs to one event loop.

    Raises:
        ConfigError: the address is no HTTP address.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = HttpClient(base_url.rstrip("/").removesuffix("/v1"), headers)
        self.where = self._http.where

    async def model(self, name: str | None = None) -> dict[str, Any]:
        """The entry of /v1/models of that name; of the first one without a name.

        Raises:
            ClientError: the server cannot be reached, or refuses.
            UnknownModelError: it has no such model, or none.
        """
        async with self._http.request("GET", "/v1/models") as response:
            answer = await _json_of(response)
        entries = answer.get("data")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise ClientError("bad answer", f"{self.where} does not answer /v1/models as OpenAI does")
        for entry in entries:
            if name is None or entry["id"] == name:
                return dict(entry)
        names = ", ".join(str(entry["id"]) for entry in entries) or "none"
        wanted = "any model" if name is None else f"the model {name!r}"
        raise UnknownModelError(f"the server at {self.where} does not have {wanted}; it has: {names}")

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Post a request with stream: true, and yield the chunks of each read of the socket. Leaving it hangs up.

        Raises:
            ClientError: its kind is "connect", "connection lost", "HTTP 429" (or another status), "error event" (an
                error after the stream began), "cut off" (an end without [DONE]) or "bad answer".
        """
        payload = json.dumps(body | {"stream": True}).encode()
        async with self._http.request("POST", path, payload) as response:
            kind = response.headers.get("content-type", "")
            if response.status != 200:
                await _json_of(response)  # raises
            if not kind.startswith("text/event-stream"):
                raise ClientError("bad answer", f"{self.where} does not stream: its answer is {kind or 'untyped'}")
            parser, is_done = EventParser(), False
            async with contextlib.aclosing(response.pieces()) as pieces:
                async for piece in pieces:
                    chunks = []
                    for data in _events(parser, piece):
                        is_done = is_done or data == _DONE
                        if not is_done:
                            chunks.append(_chunk(data))
                    if chunks:
                        yield chunks
            if not is_done:
                raise ClientError("cut off", f"{self.where} ended a stream without {_DONE}")

    def close(self) -> None:
        """Hang up on the connections that are kept. Harmless twice."""
        self._http.close()


def _events(parser: EventParser, piece: bytes) -> list[str]:
    try:
        return parser.feed(piece)
    except ValueError as error:
        raise ClientError("bad answer", f"an unreadable event: {error}") from error


def _chunk(data: str) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except (ValueError, RecursionError):
        chunk = None
    if not isinstance(chunk, dict):
        raise ClientError("bad answer", f"an event that is no JSON object: {data[:100]!r}")
    if chunk.get("error") or chunk.get("object") == "error":
        raise _refusal("error event", None, chunk, "an error without a message")
    return chunk


async def _json_of(response: Response) -> dict[str, Any]:
    """The JSON object of an answer with status 200. Raises ClientError for any other."""
    body = await response.read(MAX_ANSWER_BYTES)
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        answer = None
    if response.status != 200:
        said = body[:200].decode(errors="replace").strip() or "nothing"
        raise _refusal(f"HTTP {response.status}", response.status, answer, f"status {response.status}: {said}")
    if not isinstance(answer, dict):
        raise ClientError("bad answer", f"an answer that is no JSON object: {body[:100]!r}", response.status)
    return answer


def _refusal(kind: str, status: int | None, answer: Any, otherwise: str) -> ClientError:
    """The error that a body or an event holds, in OpenAI's form or in vLLM's older one without `error` around it."""
    error = answer.get("error") or answer if isinstance(answer, dict) else {}
    if not isinstance(error, dict):
        error = {"message": error}
    code = error.get("code")
    return ClientError(kind, str(error.get("message") or otherwise), status, None if code is None else str(code))
