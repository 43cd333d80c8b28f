"""Several front-end processes on one port, over the demo model: who serves, who dies, and what is left."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from configs.engine import EngineConfig, ServerConfig
from configs.errors import EngineError
from launch.front_group import front_config
from launch.listener import listening
from tests.launch.server_process import ServerProcess

KEY = "open-sesame"
HEADERS = {"Authorization": f"Bearer {KEY}"}
ASKED = {"prompt": "中国的首都是", "temperature": 0, "max_tokens": 8}
ENDLESS = {"prompt": "Once", "ignore_eos": True, "max_tokens": 3000, "stream": True}


@pytest.fixture
def run_base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nano-test-") as name:  # short: sockets lie in there
        yield Path(name)


@pytest.fixture
def server(run_base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServerProcess]:
    monkeypatch.setenv("NANOENGINE_API_KEY", KEY)
    with ServerProcess("--api-server-count", "2", "--shutdown-timeout", "20", run_base=run_base) as server:
        server.wait_ready()
        yield server


def family(server: ServerProcess) -> list[psutil.Process]:
    return psutil.Process(server.process.pid).children(recursive=True)


def fronts(server: ServerProcess) -> list[psutil.Process]:
    found = []
    for child in family(server):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            found += [child] if "launch.front_end_process" in child.cmdline() else []
    return found


def until(condition: Callable[[], object], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def streams(url: str, count: int, asked: dict[str, object] = ENDLESS) -> Iterator[list[Iterator[str]]]:
    """So many streams, each on a connection of its own, and each with its first event read."""
    with contextlib.ExitStack() as stack:
        lines = []
        for _ in range(count):
            client = stack.enter_context(httpx.Client(base_url=url, headers=HEADERS, timeout=30))
            lines.append(stack.enter_context(client.stream("POST", "/v1/completions", json=asked)).iter_lines())
        assert all(next(each).startswith("data:") for each in lines)
        yield lines


def serving(front: psutil.Process) -> int:
    return sum(connection.status == psutil.CONN_ESTABLISHED for connection in front.net_connections("tcp"))


def test_front_ends_share_the_port_and_one_that_dies_is_replaced(server: ServerProcess) -> None:
    url = server.wait_ready()
    assert len(server.out) == 1, "it says once that it is ready"
    assert len(fronts(server)) == 2
    for process in family(server):
        told = Path(f"/proc/{process.pid}/cmdline").read_bytes() + Path(f"/proc/{process.pid}/environ").read_bytes()
        assert KEY.encode() not in told
    assert httpx.get(f"{url}/v1/models").status_code == 401
    with streams(url, 16, ENDLESS | {"max_tokens": 300}) as lines:
        victim, survivor = fronts(server)
        assert serving(victim) >= 1, "one front end has all connections"
        assert serving(survivor) >= 1
        victim.kill()
        until(lambda: len(fronts(server)) == 2 and victim not in fronts(server))
        broken = 0
        for each in lines:
            try:
                assert [line for line in each if line][-1] == "data: [DONE]"
            except httpx.HTTPError:
                broken += 1
        assert 0 < broken < 16, "the streams of the one break off, and the others go on"
        assert survivor.is_running()
    until(lambda: len([1 for _ in range(6) if httpx.get(f"{url}/readyz", headers=HEADERS).status_code == 200]) == 6)
    assert httpx.post(f"{url}/v1/completions", json=ASKED, headers=HEADERS).json()["choices"][0]["text"] == "北京"
    assert any("it is started again" in line for line in server.err)


def test_a_stop_reaches_every_front_end_and_leaves_nothing(server: ServerProcess, run_base: Path) -> None:
    url, before = server.wait_ready(), family(server)
    with streams(url, 6, ENDLESS | {"max_tokens": 300}) as lines:
        # Also to the front ends themselves, as a service manager does that signals the whole group.
        for front in fronts(server):
            front.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM)
        with httpx.Client(base_url=url, headers=HEADERS) as client:
            assert client.get("/readyz").json()["error"]["code"] == "draining"
        for each in lines:
            rest = [line for line in each if line]
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
            assert rest[-1] == "data: [DONE]"
    assert server.process.wait(5) == 0
    _, alive = psutil.wait_procs(before, timeout=5)
    assert not alive
    assert not list(run_base.iterdir())
    assert "Traceback" not in "".join(server.err)


def test_the_engines_end_is_told_to_every_client(server: ServerProcess, run_base: Path) -> None:
    url, before = server.wait_ready(), family(server)
    with streams(url, 6) as lines:
        next(child for child in before if "nanoengine.engine" in child.cmdline()).kill()
        for each in lines:
            rest = [line for line in each if line]
            assert "SIGKILL" in json.loads(rest[-2][6:])["error"]["message"]
            assert rest[-1] == "data: [DONE]"
    assert server.process.wait(8) == 1
    assert sum(line.startswith("nanoengine: error:") for line in server.err) == 1
    _, alive = psutil.wait_procs(before, timeout=5)
    assert not alive
    assert not list(run_base.iterdir())


def test_nothing_outlives_a_supervisor_that_is_killed(server: ServerProcess, run_base: Path) -> None:
    server.wait_ready()
    before = family(server)
    server.process.kill()
    _, alive = psutil.wait_procs(before, timeout=8)
    assert not alive
    until(lambda: not list(run_base.iterdir()))


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
