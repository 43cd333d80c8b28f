"""A whole server on the demo model under requests that nobody means well with: refused at once, nobody harmed."""

from __future__ import annotations

import collections
import http.client
import json
import os
import random
import socket
import statistics
import string
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.bench.processes import proportional_memory, tree
from tests.launch.hostile_requests import Case, cases
from tests.launch.server_process import ServerProcess

LIMIT_SECONDS = 1.0
# What the processes may grow by while they see each case, after they have seen each once. A leak of a body would show.
MAX_GROWTH = 48 * 2**20
STORY = {
    "prompt": "Tell me a story about Lily the bear, the garden and the flute.",
    "max_tokens": 300,
    "temperature": 0,
    "ignore_eos": True,
    "stream": True,
    "return_token_ids": True,
}
NUM_FUZZED = int(os.environ.get("NANOENGINE_FUZZED_REQUESTS", "500"))


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("--tp", "1") as process:
        url = process.wait_ready()
        # The first structured output starts the process that compiles them.
        httpx.post(f"{url}/v1/completions", json={"prompt": "x", "max_tokens": 1, "guided_choice": ["a"]}, timeout=30)
        yield process


@pytest.fixture(scope="module")
def url(server: ServerProcess) -> str:
    return server.wait_ready()


def ask(url: str, case: Case) -> tuple[int, str, float]:
    """Status, body and seconds."""
    began, address = time.monotonic(), urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=20)
    try:
        connection.request(case.method, case.path, case.body or None, case.headers)
        answer = connection.getresponse()
        return answer.status, answer.read(2000).decode(errors="replace"), time.monotonic() - began
    finally:
        connection.close()


def lasting(server: ServerProcess) -> set[int]:
    """The server's processes but the one in which grammars are compiled, which is there to be killed."""
    pids = tree(server.process.pid)
    return {pid for pid in pids if Path(f"/proc/{pid}/comm").read_text().strip() != "nano-grammar"}


def story(url: str) -> list[int]:
    """The ids of a stream that others must not disturb."""
    ids: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json=STORY, timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                ids.extend(token for choice in event["choices"] for token in choice["token_ids"] or [])
    return ids


@pytest.mark.timeout(240)
def test_every_hostile_request_is_a_4xx_at_once_and_streams_go_on(server: ServerProcess, url: str) -> None:
    table, wrong, slow = cases(), [], []
    assert len(table) >= 300
    undisturbed, stories, is_over = story(url), [], threading.Event()

    def tell() -> None:
        while not is_over.is_set():
            stories.append(story(url))

    pids = lasting(server)
    teller = threading.Thread(target=tell)
    teller.start()
    try:
        for case in table:
            status, body, seconds = ask(url, case)
            if not 400 <= status < 500 or not body:
                wrong.append((case.name, status, body))
            if seconds > LIMIT_SECONDS:
                slow.append(case)
    finally:
        is_over.set()
        teller.join()
    assert not wrong
    assert len(undisturbed) == 300
    assert stories == [undisturbed] * len(stories)
    # A busy machine, or the stream, may have been in the way: once more, alone.
    still_slow = {case.name: seconds for case in slow if (seconds := ask(url, case)[2]) > LIMIT_SECONDS}
    assert not still_slow
    memory = proportional_memory(tree(server.process.pid))
    for case in random.Random(1).sample(table, 150):
        ask(url, case)
    assert proportional_memory(tree(server.process.pid)) - memory < MAX_GROWTH
    assert lasting(server) == pids, "a process was lost or replaced"
    assert httpx.get(f"{url}/health").status_code == 200
    assert not [line for line in server.err if "Traceback" in line or " ERROR " in line]


def test_a_prefix_of_an_id_aborts_nobody(url: str) -> None:
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=STORY, headers={"X-Request-Id": "abcdef"}, timeout=60
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        for other in ("abcde", "cmpl-abcde", "abcdef0", "cmpl-", "", "*", "abc%", "abcdef-0", "ABCDEF", "[a-z]*"):
            assert httpx.post(f"{url}/abort", json={"request_id": other}).json() == {"aborted": []}
        assert '"finish_reason":"length"' in "".join(lines)


# ---------------------------------------------------------------------------------------------- below HTTP's grammar

RAW = {
    "garbage": b"\x00\x01\x02\xff" * 100 + b"\r\n\r\n",
    "tls hello": bytes.fromhex("16030100") + b"\xff" * 200,
    "no version": b"GET /v1/models\r\n\r\n",
    "odd version": b"GET /v1/models HTTP/x.y\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}   ",
    "length and chunks": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "negative length": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "huge length": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "bad chunk": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "header fold": b"GET /livez HTTP/1.1\r\nHost: x\r\n folded\x00\r\n\r\n",
    "nul in a header": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
    "bare newline": b"GET /livez HTTP/1.1\nHost: x\nX: \x0b\x0c\n\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "many headers": b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 20_000 + b"\r\n",
    "connect": b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: x\r\n\r\n",
    "trace": b"TRACE /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "odd method": b"\xff\xfe /livez HTTP/1.1\r\nHost: x\r\n\r\n",
    "other host": b"GET http://169.254.169.254/latest/meta-data HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n",
    "odd id": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: a b\xff\r\n\r\n",
    "cut body": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{",
    "only a line": b"POST /tokenize HTTP/1.1\r\n",
}


@pytest.mark.parametrize("sent", RAW.values(), ids=RAW)
def test_what_is_no_request_is_refused_or_dropped(server: ServerProcess, url: str, sent: bytes) -> None:
    """The client closes its half of the connection afterwards, and gets an error or the end, never a 2xx or a 5xx."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port), timeout=15) as connection:
        try:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        except TimeoutError:
            raise
        except OSError:  # the server has hung up
            answer = b""
    assert not answer or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert httpx.get(f"{url}/livez").status_code == 200


# ------------------------------------------------------------------------------------------------- fuzzing

_ODD_TEXTS = ["", "\x00", "\ud800", "a" * 3000, "{{7*7}}", "../../x", "<|im_end|>", "demo", "0", "(((", "{", "[a-"]
_TEXT = st.one_of(st.text(max_size=20), st.sampled_from(_ODD_TEXTS))
_INTS = st.sampled_from([-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 4, 2**31, 2**32, 2**63, 2**64, 10**30])
_NUMBERS = st.one_of(_INTS, st.floats(), st.sampled_from([0.1, 0.5, 1.0, 1e308]))
_ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBERS, _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXT, inner, max_size=4)),
    max_leaves=8,
)
# What is long by its nature, and what asks for as many tokens as fit when it is left out.
_SMALL = {"max_tokens": 2, "max_completion_tokens": 2, "n": 2, "best_of": 2}


def _value(schema: dict[str, Any], document: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """What a schema of the document allows, with edges and, now and then, anything at all."""
    if depth > 4:
        return _ANY
    if "$ref" in schema:
        return _value(document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]], document, depth)
    if "anyOf" in schema:
        return st.one_of(*(_value(each, document, depth + 1) for each in schema["anyOf"]))
    match schema.get("type"):
        case "string":
            return _TEXT
        case "integer":
            return _INTS
        case "number":
            return _NUMBERS
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "array":
            return st.lists(_value(schema.get("items", {}), document, depth + 1), max_size=4)
        case "object" if "properties" in schema:
            return _object(schema, document, depth + 1)
        case _:
            return _ANY


def _object(schema: dict[str, Any], document: dict[str, Any], depth: int) -> st.SearchStrategy[dict[str, Any]]:
    known = {name: st.one_of(_value(each, document, depth), _ANY) for name, each in schema["properties"].items()}
    wanted = {name: known[name] for name in schema.get("required", ())}

    @st.composite
    def made(draw: st.DrawFn) -> dict[str, Any]:
        names = draw(st.lists(st.sampled_from(sorted(known)), max_size=5, unique=True))
        fields = {name: draw(each) for name, each in (wanted | {name: known[name] for name in names}).items()}
        if draw(st.integers(0, 9)) == 0:
            fields[draw(_TEXT)] = draw(_ANY)
        return fields

    return made()


_MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool"]), "content": _TEXT}),
    max_size=3,
)


def _operations(document: dict[str, Any]) -> st.SearchStrategy[tuple[str, str, Any]]:
    """(method, path, JSON body or None) over every operation of an OpenAPI document."""
    every = []
    for path, methods in sorted(document["paths"].items()):
        for method, operation in sorted(methods.items()):
            filled = _TEXT.map(lambda text, path=path: path.split("{")[0] + "".join(
                char if char in string.ascii_letters else f"%{ord(char) % 256:02x}" for char in text[:50]
            ) if "{" in path else path)  # fmt: skip
            body: st.SearchStrategy[Any] = st.none()
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                body = st.one_of(_value(schema, document), _ANY)
                if method == "post" and "chat" in path:
                    body = st.tuples(_value(schema, document), _MESSAGES).map(
                        lambda pair: {**pair[0], "messages": pair[1]}
                    )
            # Half of the requests go where requests are read.
            every.extend([st.tuples(st.just(method), filled, body)] * (4 if "requestBody" in operation else 1))
    return st.one_of(*every)


def _shortened(path: str, body: Any) -> Any:
    """The same, where it would be a request for thousands of tokens, for a few."""
    if not isinstance(body, dict):
        return body
    if path == "/generate":
        inner = body.get("sampling_params")
        params = inner if isinstance(inner, dict) else {} if inner is None else None
        return body if params is None else body | {"sampling_params": {"max_tokens": 2} | _small(params)}
    defaults = {"max_tokens": 2} if path.startswith("/v1/") else {}
    return defaults | _small(body)


def _small(fields: dict[str, Any]) -> dict[str, Any]:
    def is_long(name: str, value: Any) -> bool:
        return name in _SMALL and (value is None or (type(value) is int and 1 <= value <= 2**31))

    return {name: _SMALL[name] if is_long(name, value) else value for name, value in fields.items()}


def test_fuzzed_requests_never_make_a_5xx(server: ServerProcess, url: str) -> None:
    """500 of them; NANOENGINE_FUZZED_REQUESTS says how many else."""
    document = httpx.get(f"{url}/openapi.json").json()
    address, statuses = urlsplit(url), collections.Counter[int]()
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=30)

    def send(method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        connection.request(method.upper(), path, data, {"Content-Type": "application/json"} if data else {})
        answer = connection.getresponse()
        return answer.status, answer.read()

    @settings(
        max_examples=NUM_FUZZED,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize="NANOENGINE_FUZZED_REQUESTS" not in os.environ,
    )
    @given(_operations(document))
    def fuzz(operation: tuple[str, str, Any]) -> None:
        method, path, body = operation
        data = None if body is None else json.dumps(_shortened(path, body)).encode()
        try:
            status, text = send(method, path, data)
        except (ConnectionError, http.client.HTTPException):
            connection.close()  # the server may end a kept connection at any time
            status, text = send(method, path, data)
        statuses[status] += 1
        # A client may ask for a timeout that nothing can meet, and is told so.
        assert status < 500 or (status == 504 and body.get("timeout")), (operation, text)
        assert b'"error":{' not in text or status >= 400, (operation, text)

    try:
        fuzz()
    finally:
        connection.close()
    print(f"{sum(statuses.values())} fuzzed requests: {dict(statuses)}")
    assert statuses[200] > NUM_FUZZED / 50, "hardly anything was well-formed"
    assert server.process.poll() is None
    assert httpx.get(f"{url}/health").status_code == 200


def test_an_answer_does_not_wait_for_the_clients_acknowledgement(url: str) -> None:
    """Head and body leave in two packets; without TCP_NODELAY the second one waits 40 ms on a kept connection."""
    with httpx.Client(base_url=url) as client:
        seconds = []
        for _ in range(15):
            began = time.monotonic()
            client.get("/livez")
            seconds.append(time.monotonic() - began)
    assert statistics.median(seconds) < 0.03
