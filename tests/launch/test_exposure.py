"""What of a running server can be reached: one address, and behind it nothing without the key, however it is spelt."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from launch.bench.processes import tree
from tests.launch.server_process import ServerProcess

KEY = "a-key-for-this-test"
LISTENING = "0A"
_ACCEPTS_CONNECTIONS = 0x10000  # __SO_ACCEPTCON of /proc/net/unix


@pytest.fixture(scope="module")
def run_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("r")


@pytest.fixture(scope="module")
def server(run_base: Path) -> Iterator[ServerProcess]:
    with ServerProcess("--tp", "2", "--api-key", KEY, run_base=run_base) as process:
        process.wait_ready()
        yield process


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.wait_ready()


def sockets_of(pids: list[int]) -> set[str]:
    """Inodes of the sockets that the processes have open."""
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                name = str(entry.readlink())
            except OSError:
                continue  # closed meanwhile
            if name.startswith("socket:["):
                found.add(name[8:-1])
    return found


def test_only_the_chosen_address_listens(server: ServerProcess, url: str, run_base: Path) -> None:
    """No port of a rendezvous, no abstract socket: what remains is in a directory that is closed to other users."""
    mine = sockets_of(tree(server.process.pid))
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in mine and (fields[3] == LISTENING or table.startswith("udp")):
                listening.append((table, fields[1]))
    port = urlsplit(url).port
    assert port is not None
    assert listening == [("tcp", f"0100007F:{port:04X}")]
    paths = []
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[6] in mine and int(fields[3], 16) & _ACCEPTS_CONNECTIONS:
            paths.append(fields[7] if len(fields) > 7 else "")
    assert not [path for path in paths if path.startswith("@")], "abstract sockets are open to every user"
    for path in paths:
        assert path, "a listening socket without a name"
        directory = Path(path).parent
        # The engine's own directory, or in it the part of one of its schedulers.
        assert run_base in (directory.parent, directory.parent.parent)
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [Path(path).name.removesuffix(".new") for path in paths if Path(path).exists()] == ["front"]


# ------------------------------------------------------------------------------------------------------- the key

GUARDED = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/readyz", "/version", "/tokenize",
           "/detokenize", "/openapi.json", "/reset_prefix_cache", "/generate", "/abort", "/load", "/metrics",
           "/v1/models/demo", "/nothing/here")  # fmt: skip
METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "BREW")


def spellings(path: str) -> Iterator[str]:
    """Other ways to write a path, in the hope that the guard and the router read them differently."""
    yield from (
        path,
        f"/{path}",
        f"/.{path}",
        f"/x/..{path}",
        f"{path}/",
        f"{path}?x=/livez",
        f"{path}#/livez",
        f"{path};a=b",
    )
    yield from (
        path.replace("/", "//"),
        path.replace("/", "%2f"),
        path.replace("/", "/%2e/"),
        path.upper(),
        f"{path}%00",
    )
    yield from (
        f"{path}%20",
        f"{path}.json",
        f"/livez/..{path}",
        f"/livez{path}",
        f"/livez%2f..{path}",
        f"/livez/../{path[1:]}",
    )
    yield from (
        f"/livez;{path}",
        f"/livez%00{path}",
        f"/static/..{path}",
        f"/static/%2e%2e{path}",
        f"/static/..%2f{path[1:]}",
    )
    yield f"/%{ord(path[1]):02x}{path[2:]}"
    yield from (
        f"http://127.0.0.1{path}",
        f"http://127.0.0.1/livez/..{path}",
        f"//livez{path}",
        path.replace("/", "\\"),
    )


def raw(url: str, sent: bytes) -> bytes:
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=15) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))
        except TimeoutError:
            raise
        except OSError:  # the server has hung up
            return b""


def statuses(answer: bytes) -> list[int]:
    return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize("path", GUARDED)
def test_the_key_guards_every_route_however_it_is_spelt(url: str, path: str) -> None:
    for target in spellings(path):
        answer = raw(url, f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert statuses(answer) in ([401], [400], [404], []), (target, answer)
        if statuses(answer) == [404]:  # under the page's own folder
            assert "static" in target
        assert b'"root"' not in answer
    for method in METHODS:
        answer = raw(url, f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert statuses(answer) in ([401], [400], []), (method, answer)


WITHOUT_KEY = {
    "http/1.0": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "another key": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key-for-this-tesu\r\n\r\n",
    "a prefix": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key-for-this-tes\r\n\r\n",
    "more than it": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer a-key-for-this-test2\r\n\r\n",
    "nothing": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \r\n\r\n",
    "no scheme": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: a-key-for-this-test\r\n\r\n",
    "basic": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Basic a-key-for-this-test\r\n\r\n",
    "in the query": b"GET /v1/models?api_key=a-key-for-this-test HTTP/1.1\r\nHost: x\r\n\r\n",
    "as a cookie": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nCookie: Authorization=Bearer a-key-for-this-test\r\n\r\n",
    "not utf-8": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
    "forwarded": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-Original-URL: /livez\r\nX-Rewrite-URL: /livez\r\n\r\n",
    "overridden": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX-HTTP-Method-Override: OPTIONS\r\n\r\n",
    "preflight": b"OPTIONS /v1/models HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\n"
    b"Access-Control-Request-Method: GET\r\n\r\n",
    "websocket": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "h2c": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    b"HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n\r\n",
}


@pytest.mark.parametrize("sent", WITHOUT_KEY.values(), ids=WITHOUT_KEY)
def test_nothing_passes_for_the_key(url: str, sent: bytes) -> None:
    answer = raw(url, sent)
    assert statuses(answer) in ([401], [400]), answer
    assert b"demo" not in answer


def test_each_request_of_a_pipeline_needs_the_key(url: str) -> None:
    """An open route, or one with the key, before it on the same connection opens nothing."""
    with_key = f"GET /version HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    sent = "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + with_key + "GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=15) as connection:
        connection.sendall(sent.encode())
        answer = b""
        while len(statuses(answer)) < 3 or not answer.endswith(b"}"):
            part = connection.recv(65536)
            assert part, answer
            answer += part
    assert statuses(answer) == [200, 200, 401]
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
    body = b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert 200 not in statuses(raw(url, body % (len(smuggled) + 5) + smuggled))


def test_with_the_key_it_serves(url: str) -> None:
    answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.json()["data"][0]["id"] == "demo"
    assert httpx.get(f"{url}/livez").json() == {"status": "alive"}
    assert KEY not in json.dumps(httpx.get(f"{url}/v1/models").json())
