"""HTTP/1.1 to one server over asyncio streams and h11, with bodies read as they arrive; knows no API.

Written for a load generator: a streamed token costs it a third of what it costs httpx, and its connections are kept.
Redirects are not followed, proxies from the environment are not used.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import h11

from configs.errors import ConfigError, EngineError

_READ_BYTES = 2**16
_MAX_HEAD_BYTES = 2**16


class ClientError(EngineError):
    """A request failed, for the client. `kind` is one of a few words, to count by; `status` is HTTP's, if it came."""

    def __init__(self, kind: str, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.kind, self.status, self.code = kind, status, code


class HttpClient:
    """Requests to the server at `base_url`, each on a connection of its own. Belongs to one event loop.

    Args:
        unix_path: the Unix socket to connect to, instead of the host that `base_url` names.

    Raises:
        ConfigError: the address is no HTTP address.
    """

    def __init__(
        self,
        base_url: str,
        headers: dict[str, str] | None = None,
        connect_timeout: float = 10.0,
        unix_path: Path | None = None,
    ) -> None:
        try:
            parts = urllib.parse.urlsplit(base_url)
            port = parts.port
        except ValueError:
            parts, port = urllib.parse.urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url must be like http://127.0.0.1:8000, got {base_url!r}", "base_url")
        self.where = parts.netloc.rpartition("@")[2]
        self._host, self._port = parts.hostname, port or {"http": 80, "https": 443}[parts.scheme]
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._root = parts.path.rstrip("/")
        self._headers = {"Host": self.where, "User-Agent": "nanoengine", **(headers or {})}
        self._connect_timeout, self._unix_path = connect_timeout, unix_path
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    @property
    def num_connections(self) -> int:
        """How many are open, those included that are kept for later."""
        return len(self._open)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it connects to."""
        return self._host, self._port

    @contextlib.asynccontextmanager
    async def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[Response]:
        """Send a request and give its response once the head is there; leaving early hangs up.

        Args:
            headers: beside those of every request.

        Raises:
            ClientError: "connect" or "connection lost".
        """
        response = await self._respond(method, path, body, headers or {})
        connection = response.connection
        try:
            yield response
        except BaseException:
            self._hang_up(connection)
            raise
        if connection.can_be_kept():
            self._idle.append(connection)
        else:
            self._hang_up(connection)

    def close(self) -> None:
        """Hang up on the connections that are kept. Harmless twice."""
        while self._idle:
            self._hang_up(self._idle.pop())

    def _hang_up(self, connection: _Connection) -> None:
        self._open.discard(connection)
        connection.hang_up()

    async def _respond(self, method: str, path: str, body: bytes, own_headers: Mapping[str, str]) -> Response:
        headers = self._headers | ({"Content-Type": "application/json"} if body else {})
        headers |= {"Content-Length": str(len(body)), **own_headers}
        request = h11.Request(method=method, target=self._root + path, headers=list(headers.items()))
        while True:
            kept = self._take_idle()
            connection = kept or await self._connect()
            try:
                return await connection.send(request, body)
            except ClientError:
                self._hang_up(connection)
                # A server may close a kept connection at any time. Nothing came of the request: once more, elsewhere.
                if kept is None or connection.has_answered:
                    raise
            except BaseException:
                self._hang_up(connection)
                raise

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.reader.at_eof():
                return connection
            self._hang_up(connection)
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._unix_path is None:
                    reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
                else:
                    reader, writer = await asyncio.open_unix_connection(self._unix_path)
        except TimeoutError as error:
            why = f"no connection within {self._connect_timeout:g} s"
            raise ClientError("connect", f"cannot reach {self.where}: {why}") from error
        except OSError as error:
            raise ClientError("connect", f"cannot reach {self.where}: {error}") from error
        connection = _Connection(reader, writer, self.where)
        self._open.add(connection)
        return connection


class Response:
    """The head of an answer, and its body as it comes. `headers` have lower-case names."""

    def __init__(self, connection: _Connection, head: h11.Response) -> None:
        self.connection = connection
        self.status = head.status_code
        self.headers = {name.decode(): value.decode("latin-1") for name, value in head.headers}

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body, a piece for each read of the socket. Raises ClientError "connection lost"."""
        while data := await self.connection.data():
            yield data

    async def read(self, limit: int) -> bytes:
        """The whole body. Raises ClientError "bad answer" when it is larger than `limit` bytes."""
        body = bytearray()
        async for piece in self.pieces():
            body += piece
            if len(body) > limit:
                raise ClientError("bad answer", f"an answer is larger than {limit} bytes", self.status)
        return bytes(body)


class _Connection:
    """One connection: bytes on one side, h11's events on the other."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: str) -> None:
        self.reader, self._writer, self._where = reader, writer, where
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self.has_answered = False  # anything, to the request that is on its way
        self._is_at_end = False  # of its body

    async def send(self, request: h11.Request, body: bytes) -> Response:
        """Send a whole request and wait for the head of its answer."""
        self.has_answered = self._is_at_end = False
        parts = [self._http.send(request)]
        if body:
            parts.append(self._http.send(h11.Data(data=body)))
        parts.append(self._http.send(h11.EndOfMessage()))
        with self._failures():
            self._writer.write(b"".join(part for part in parts if part))
            await self._writer.drain()
        while True:
            event = self._next_event()
            if isinstance(event, h11.Response):
                return Response(self, event)
            if event is h11.NEED_DATA:
                await self._receive()

    async def data(self) -> bytes:
        """What has come of the body, waiting until there is some; empty at its end."""
        found: list[bytes] = []
        while not self._is_at_end:
            event = self._next_event()
            if isinstance(event, h11.Data):
                found.append(bytes(event.data))
            elif event is h11.NEED_DATA and not found:
                await self._receive()
            else:
                self._is_at_end = isinstance(event, h11.EndOfMessage)
                break
        return b"".join(found)

    def _next_event(self) -> Any:
        with self._failures():
            event = self._http.next_event()
            if isinstance(event, h11.ConnectionClosed):
                raise ConnectionError("the server closed the connection")
            return event

    async def _receive(self) -> None:
        with self._failures():
            data = await self.reader.read(_READ_BYTES)
            self.has_answered = self.has_answered or bool(data)
            self._http.receive_data(data)

    def can_be_kept(self) -> bool:
        """Whether another request may follow; then it is ready for it."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    def hang_up(self) -> None:
        """Close at once, whatever is on its way."""
        self._writer.transport.abort()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, h11.RemoteProtocolError) as error:
            raise ClientError("connection lost", f"{self._where}: {error or type(error).__name__}") from error
