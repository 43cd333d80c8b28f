"""Several front-end processes on one port, over the demo model: who serves, who dies, and what is left."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from configs.engine import EngineConfig, ServerConfig
from configs.errors import EngineError
from launch.front_group import front_config
from launch.listener import listening
from tests.launch.server_process import ServerProcess
from tests.waiting import until

KEY = "open-sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ASKED = {"prompt": "中国的首都是", "temperature": 0, "max_tokens": 8}
LONG = {"prompt_token_ids": [5, 6, 7], "sampling_params": {"ignore_eos": True, "max_tokens": 3000}, "stream": True}
ENDLESS = {"prompt": "Once", "ignore_eos": True, "max_tokens": 3000, "stream": True}


@contextlib.contextmanager
def started(*options: str) -> Iterator[tuple[ServerProcess, Path]]:
    """A server with two front ends, and where its run directory is made."""
    with tempfile.TemporaryDirectory(prefix="nano-test-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOENGINE_API_KEY", KEY)
        options = ("--api-server-count", "2", "--shutdown-timeout", "100", *options)
        with ServerProcess(*options, run_base=Path(name)) as server:
            server.wait_ready()
            yield server, Path(name)


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[ServerProcess, Path]]:
    """For the tests that leave it as it was; the last of them kills it."""
    with started() as both:
        yield both


@pytest.fixture
def server(shared: tuple[ServerProcess, Path]) -> ServerProcess:
    return shared[0]


@pytest.fixture
def url(server: ServerProcess) -> str:
    return server.wait_ready()


@pytest.fixture
def options() -> tuple[str, ...]:
    """Further ones of a server of one's own."""
    return ()


@pytest.fixture
def own(options: tuple[str, ...]) -> Iterator[tuple[ServerProcess, Path]]:
    """For a test that ends it."""
    with started(*options) as both:
        yield both


def family(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def fronts(server: ServerProcess) -> list[psutil.Process]:
    found = []
    for child in family(server):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            found += [child] if "launch.front_end_process" in child.cmdline() else []
    return found


class Open:
    """A stream that is read in a thread, on a connection of its own; `events` are what came so far."""

    def __init__(self, url: str, path: str, asked: dict[str, Any], request_id: str = "") -> None:
        self.events: list[str] = []
        self.error: httpx.HTTPError | None = None
        headers = HEADERS | ({"X-Request-Id": request_id} if request_id else {})
        self._thread = threading.Thread(target=self._read, args=(url + path, asked, headers))
        self._thread.start()

    def _read(self, url: str, asked: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            with httpx.stream("POST", url, json=asked, headers=headers, timeout=100) as response:
                # Each line as it comes; a stream that is silent for long, as on a busy machine, gives signs of life.
                self.events.extend(line for line in response.iter_lines() if line.startswith("data: "))
        except httpx.HTTPError as error:
            self.error = error

    def until(self, count: int) -> None:
        until(lambda: len(self.events) >= count or self.error)
        assert self.error is None

    def wait(self) -> None:
        self._thread.join(100)
        assert not self._thread.is_alive(), "it was not ended"

    def end(self) -> list[dict[str, Any]]:
        """Wait for its end; what it was told, `[DONE]` aside."""
        self.wait()
        assert self.error is None
        assert self.events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in self.events[:-1]]

    def reason(self) -> str:
        """How it ended."""
        last = self.end()[-1]
        reason: str = (last.get("choices") or last.get("outputs"))[0]["finish_reason"]
        return reason


def opened(server: ServerProcess, asked: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, Open]:
    """Streams, each with its first event there, by request id. All begin at one moment: none is ahead of the others."""
    url, before = server.wait_ready(), set().union(*map(serving, fronts(server)))  # some of them may end meanwhile
    with server.held():
        streams = {name: Open(url, *each, name) for name, each in asked.items()}
        until(lambda: len(set().union(*map(serving, fronts(server))) - before) >= len(streams))
        time.sleep(0.2)  # for most of them to hand in their requests; whoever is late only begins later
    for stream in streams.values():
        stream.until(1)
    return streams


def serving(front: psutil.Process) -> set[int]:
    """Ports of the clients that are connected to it."""
    connections = front.net_connections("tcp")
    return {each.raddr.port for each in connections if each.status == psutil.CONN_ESTABLISHED}


def test_front_ends_share_the_port_and_one_that_dies_is_replaced(server: ServerProcess) -> None:
    url = server.wait_ready()
    assert len(server.out) == 1, "it says once that it is ready"
    assert len(fronts(server)) == 2
    for process in family(server):
        told = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
        assert KEY.encode() not in told
    assert httpx.get(f"{url}/v1/models").status_code == 401
    asked = ("/v1/completions", ENDLESS | {"max_tokens": 300})
    streams = list(opened(server, {f"id-{number}": asked for number in range(16)}).values())
    with server.held():
        victim, survivor = fronts(server)
        assert serving(victim), "one front end has all connections"
        assert serving(survivor)
        victim.kill()
        until(lambda: len(fronts(server)) == 2 and victim not in fronts(server))
    broken = 0
    for stream in streams:
        stream.wait()
        broken += stream.error is not None
        assert stream.error is not None or stream.reason() == "length"
    assert 0 < broken < 16, "the streams of the one break off, and the others go on"
    assert survivor.is_running()
    until(lambda: len([1 for _ in range(6) if httpx.get(f"{url}/readyz", headers=HEADERS).status_code == 200]) == 6)
    assert httpx.post(f"{url}/v1/completions", json=ASKED, headers=HEADERS).json()["choices"][0]["text"] == "北京"
    assert any("it is started again" in line for line in server.err)


def load(url: str) -> dict[str, int]:
    found: dict[str, int] = httpx.get(f"{url}/load", headers=HEADERS).json()
    assert found["server_load"] == found["running"] + found["waiting"]
    return found


def test_requests_are_ended_by_their_ids_wherever_they_are(server: ServerProcess, url: str) -> None:
    """Each connection goes to one of two front ends, and so does the abort."""

    def abort(ids: str | list[str]) -> int:
        return httpx.post(f"{url}/abort", headers=HEADERS, json={"request_id": ids}).status_code

    chat = {"messages": [{"role": "user", "content": "a"}], "ignore_eos": True, "max_tokens": 3000, "stream": True}
    texts = {"prompt": ["a", "b"], "ignore_eos": True, "max_tokens": 3000, "stream": True}
    asked: dict[str, tuple[str, dict[str, Any]]] = {f"id-{number}": ("/generate", LONG) for number in range(6)}
    streams = opened(server, asked | {"chat": ("/v1/chat/completions", chat), "texts": ("/v1/completions", texts)})
    with server.held():
        assert {load(url)["running"] for _ in range(20)} != {0}
    assert httpx.post(f"{url}/abort", headers=HEADERS, json={"request_id": "nobody"}).json() == {"aborted": []}
    assert abort("gen-id-0") == 200
    assert streams.pop("id-0").reason() == "abort"
    assert abort(["id-1", "chat", "texts"]) == 200
    assert [streams.pop(name).reason() for name in ("id-1", "chat", "texts")] == ["abort"] * 3
    for stream in streams.values():  # the others go on
        stream.until(len(stream.events) + 5)
    assert httpx.post(f"{url}/abort", headers=HEADERS, json={"abort_all": True}).status_code == 200
    assert [stream.reason() for stream in streams.values()] == ["abort"] * 4
    assert all(load(url)["server_load"] == 0 for _ in range(10))
    asked_last = {"input_ids": [5], "sampling_params": {"max_tokens": 2, "ignore_eos": True}}
    answer = httpx.post(f"{url}/generate", headers=HEADERS, json=asked_last)
    assert len(answer.json()["outputs"][0]["token_ids"]) == 2


def test_a_stream_is_resumed_through_any_front_end_until_its_own_dies(shared: tuple[ServerProcess, Path]) -> None:
    server, run_base = shared
    url = server.wait_ready()
    asked = {"prompt": "Once", "ignore_eos": True, "max_tokens": 100, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=asked, headers=HEADERS | {"X-Stream-Resume": "1"}) as first:
        stream_id = first.headers["x-stream-id"]
        begun = next(first.iter_text())
    last = begun.rpartition("id: ")[2].partition("\n")[0]
    asking = {"headers": HEADERS | {"Last-Event-ID": last}, "timeout": 30.0}
    path = f"{url}/v1/streams/{stream_id}"
    rests = {httpx.get(path, **asking).text for _ in range(12)}  # each connection goes to one of two front ends
    assert len(rests) == 1
    (rest,) = rests
    events = [json.loads(line[6:]) for line in (begun + rest).splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    whole = httpx.post(f"{url}/v1/completions", json=asked | {"stream": False}, headers=HEADERS, timeout=30).json()
    assert text == whole["choices"][0]["text"]
    (claim,) = run_base.glob("*/fronts/streams/*")
    (keeper,) = (
        front
        for front in fronts(server)
        if any(each.laddr.endswith(f"/{claim.readlink()}.http") for each in front.net_connections("unix"))
    )
    keeper.kill()
    until(lambda: len(fronts(server)) == 2 and keeper not in fronts(server))
    for _ in range(6):
        error = httpx.get(path, **asking).json()["error"]
        assert error["code"] == "stream_not_found"
    assert not list(run_base.glob("*/fronts/streams/*"))


def test_an_id_that_is_in_use_is_refused(server: ServerProcess, url: str) -> None:
    def ask_again(_: int) -> httpx.Response:
        body = {"input_ids": [1], "sampling_params": {"max_tokens": 1}}
        return httpx.post(f"{url}/generate", json=body, headers=HEADERS | {"X-Request-Id": "twice"}, timeout=100)

    first = opened(server, {"twice": ("/generate", LONG)})["twice"]
    with ThreadPoolExecutor(20) as pool:
        with server.held():
            # Each connection goes to one of two front ends, and one of them has it open.
            answers = [pool.submit(ask_again, number) for number in range(20)]
            until(lambda: any(answer.done() for answer in answers))
        refused = [answer.result().json()["error"] for answer in answers if answer.result().status_code != 200]
    assert refused
    assert all((error["param"], "still runs" in error["message"]) == ("request_id", True) for error in refused)
    assert httpx.post(f"{url}/abort", headers=HEADERS, json={"abort_all": True}).status_code == 200
    assert first.reason() == "abort"


def scheduler_of(server: ServerProcess) -> psutil.Process | None:
    """The scheduler's process, if there is one right now."""
    for child in family(server):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            if "nanoengine.engine" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                return child
    return None


def test_streams_of_all_front_ends_go_on_when_the_scheduler_is_killed(server: ServerProcess, url: str) -> None:
    asked = ENDLESS | {"max_tokens": 100, "temperature": 1.0, "seed": 5}
    answer = httpx.post(f"{url}/v1/completions", json=asked | {"stream": False}, headers=HEADERS, timeout=60)
    whole = asked | {"stream_options": {"include_usage": True}}
    streams = opened(server, {f"id-{number}": ("/v1/completions", whole) for number in range(12)})
    with server.held():
        assert all(serving(front) for front in fronts(server))
        first = scheduler_of(server)
        assert first is not None
        first.kill()
    until(lambda: scheduler_of(server) not in (first, None))
    second = scheduler_of(server)
    assert second is not None
    second.suspend()  # so that what follows is asked while there is none that serves
    until(lambda: all(httpx.get(f"{url}/readyz", headers=HEADERS).status_code == 503 for _ in range(10)))
    probed = httpx.get(f"{url}/readyz", headers=HEADERS)
    refused = httpx.post(f"{url}/v1/completions", json=ASKED, headers=HEADERS)
    assert httpx.get(f"{url}/livez").status_code == 200
    with contextlib.suppress(psutil.NoSuchProcess):  # killed, if that took too long
        second.resume()
    for each in (probed, refused):
        assert (each.status_code, each.json()["error"]["code"]) == (503, "recovering")
        assert "the scheduler process (pid" in each.json()["error"]["message"]
        assert int(each.headers["Retry-After"]) > 0
    for stream in streams.values():
        *events, usage = stream.end()
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == answer.json()["choices"][0]["text"]
        assert usage["usage"]["completion_tokens"] == 100
    until(lambda: all(httpx.get(f"{url}/readyz", headers=HEADERS).status_code == 200 for _ in range(10)))
    assert len(fronts(server)) == 2
    assert len(server.out) == 1, "it says once that it is ready"


def test_nothing_outlives_a_supervisor_that_is_killed(shared: tuple[ServerProcess, Path]) -> None:
    """Runs last of those that share a server: it is gone afterwards."""
    server, run_base = shared
    before = family(server)
    server.process.kill()
    _, alive = psutil.wait_procs(before, timeout=15)
    assert not alive
    until(lambda: not list(run_base.iterdir()))


def test_a_stop_reaches_every_front_end_and_leaves_nothing(own: tuple[ServerProcess, Path]) -> None:
    server, run_base = own
    url, before = server.wait_ready(), family(server)
    asked = ("/v1/completions", ENDLESS | {"max_tokens": 300})
    streams = opened(server, {f"id-{number}": asked for number in range(6)})
    with server.held():
        # Also to the front ends themselves, as a service manager does that signals the whole group.
        for front in fronts(server):
            front.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url, headers=HEADERS) as client:
            until(lambda: client.get("/readyz").status_code != 200)
            assert client.get("/readyz").json()["error"]["code"] == "draining"
    assert [stream.reason() for stream in streams.values()] == ["length"] * 6
    assert server.process.wait(15) == 0
    _, alive = psutil.wait_procs(before, timeout=15)
    assert not alive
    assert not list(run_base.iterdir())
    assert "Traceback" not in "".join(server.err)


@pytest.mark.parametrize("options", [("--max-restarts", "0")])
def test_the_engines_end_is_told_to_every_client(own: tuple[ServerProcess, Path]) -> None:
    server, run_base = own
    before = family(server)
    streams = opened(server, {f"id-{number}": ("/v1/completions", ENDLESS) for number in range(6)})
    next(child for child in before if "nanoengine.engine" in child.cmdline()).kill()
    for stream in streams.values():
        assert "SIGKILL" in stream.end()[-1]["error"]["message"]
    assert server.process.wait(15) == 1
    assert sum(line.startswith("nanoengine: error:") for line in server.err) == 1
    _, alive = psutil.wait_procs(before, timeout=15)
    assert not alive
    assert not list(run_base.iterdir())


# --- parts ---


def test_sockets_share_a_port_among_themselves_and_with_nobody_else() -> None:
    with listening(ServerConfig(port=0), False, 3) as mine:
        port = mine[0].getsockname()[1]
        assert {each.getsockname()[1] for each in mine} == {port}
        with pytest.raises(EngineError, match="in use"), listening(ServerConfig(port=port), False, 3):
            pass
        with pytest.raises(EngineError, match="in use"), listening(ServerConfig(port=port), False):
            pass
    somebody = socket.create_server(("127.0.0.1", port))
    with somebody, pytest.raises(EngineError, match="in use"), listening(ServerConfig(port=port), False, 2):
        pass


def test_connections_of_the_dead_are_noticed() -> None:
    with listening(ServerConfig(port=0), False) as (mine,), socket.create_connection(mine.getsockname()):
        mine.setblocking(True)
        connection, _ = mine.accept()
        with connection:
            assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1


def test_each_front_end_has_its_share_of_the_queue_and_seeds_of_its_own() -> None:
    """Two requests of the same prompt must differ, also when they come to two front ends."""
    config = EngineConfig.create(seed=7, api_server_count=3, max_queued_requests=10, max_queued_tokens=100)
    configs = [front_config(config, number) for number in range(5)]
    assert [each.server.max_queued_requests for each in configs] == [4] * 5
    assert [each.server.max_queued_tokens for each in configs] == [34] * 5
    seeds = [each.model.seed for each in configs]
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert seeds == [front_config(config, number).model.seed for number in range(5)]
