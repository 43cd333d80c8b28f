"""Starting, signals and ends of the whole server, as a process of its own with an engine that only pretends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.launch.server_process import ROOT, Program

PROGRAM = """
import asyncio, os, signal, sys
import launch.supervisor as supervisor
from configs.errors import CapacityError, EngineDeadError
from nanoengine.outputs import CompletionOutput, RequestMetrics, RequestOutput

class Pretender:
    tokenizer, num_unfinished, recovering_from = None, 0, None
    def __init__(self, config):
        self.config, self.is_ready, self.failure = config, False, None
    async def start(self):
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGUSR2, self.die, "rank 1 was killed")
        while {held} and not os.path.exists({gate}):
            await asyncio.sleep(0.01)
        if {start_fails}:
            raise CapacityError("more memory is asked for\\nthan there is")
        self.is_ready = True
    def die(self, why):
        self.is_ready, self.failure = False, EngineDeadError(why)
    async def close(self):
        if self.failure is None:
            self.die("the engine was closed")
        print("closed", file=sys.stderr, flush=True)
    def check_queue(self, num_requests=1):
        pass
    async def generate(self, prompt, params=None, request_id=None):
        count = 0
        self.num_unfinished += 1
        while self.failure is None:
            count += 1
            await asyncio.sleep(0.02)
            last = CompletionOutput(0, "x" * count, [1])
            if {ends} and os.path.exists({gate}):
                last.finish_reason = "length"
                self.num_unfinished -= 1
            yield RequestOutput(request_id, None, prompt, [last], last.finished, RequestMetrics(0))
            if last.finished:
                return
        self.num_unfinished -= 1
        raise self.failure

supervisor.AsyncLLM = Pretender
from launch.cli import main
sys.exit(main(["--port", "0", "--shutdown-timeout", "{drain_seconds}", *{options}]))
"""


class Server(Program):
    """A server over a Pretender.

    With `held` its start waits for `open_gate`, and with `ends` the end of its streams does. `die` ends its engine.
    """

    def __init__(self, gate: Path, **how: Any) -> None:
        self._gate = gate
        settings = {
            "gate": str(gate),
            "held": False,
            "options": [],
            "start_fails": False,
            "drain_seconds": 5,
            "ends": False,
        } | how
        program = PROGRAM
        for name, value in settings.items():
            program = program.replace("{" + name + "}", repr(value))
        super().__init__([sys.executable, "-c", program])

    def address(self) -> str:
        """Where it listens, which it logs before it loads."""
        self.until(lambda: any("listening on" in line for line in self.err))
        (line,) = [line for line in self.err if "listening on" in line]
        found = re.search(r"http://[^;\s]+", line)
        assert found is not None
        return found[0]

    def ready(self) -> str:
        self.until(lambda: bool(self.out))
        return self.address()

    def open_gate(self) -> None:
        self._gate.touch()

    def die(self) -> None:
        self.process.send_signal(signal.SIGUSR2)

    def errors(self) -> list[str]:
        return [line for line in self.err if line.startswith("nanoengine: error:")]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def make(**how: Any) -> Server:
        servers.append(Server(tmp_path / f"gate{len(servers)}", **how))
        return servers[-1]

    yield make
    for server in servers:
        server.process.kill()
        server.stop(None)


def test_health_turns_green_with_the_one_line_on_stdout(start: Callable[..., Server]) -> None:
    server = start(held=True)
    url = server.address()
    loading = httpx.get(f"{url}/health")
    assert (loading.status_code, loading.json()["error"]["code"]) == (503, "loading")
    assert httpx.get(f"{url}/livez").status_code == 200
    assert not server.out
    server.open_gate()
    assert server.ready() == url
    assert httpx.get(f"{url}/health").status_code == 200
    assert server.stop(signal.SIGTERM) == 0
    assert server.out == [f"nanoengine ready: {url} (model=demo, tp=1)\n"]
    assert "Traceback" not in "".join(server.err)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("loading", [True, False])
def test_a_signal_stops_it_cleanly_also_while_it_loads(
    start: Callable[..., Server], number: int, loading: bool
) -> None:
    server = start(held=loading)
    server.address() if loading else server.ready()
    assert server.stop(number) == 0
    assert "closed\n" in server.err
    assert "Traceback" not in "".join(server.err)
    assert bool(server.out) is not loading


def test_an_idle_connection_does_not_delay_the_stop(start: Callable[..., Server]) -> None:
    server = start()
    with httpx.Client() as client:
        assert client.get(f"{server.ready()}/health").status_code == 200
        assert server.stop(signal.SIGTERM) == 0


def test_a_second_signal_ends_it_at_once(start: Callable[..., Server]) -> None:
    server = start(drain_seconds=60)
    url = server.ready()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}) as response:
        lines = response.iter_lines()  # forgetting it would hang up
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: any("may go on for 60 s" in line for line in server.err))
        assert server.stop(signal.SIGINT, seconds=5) == 128 + signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_lets_open_streams_finish_and_takes_nothing_new(start: Callable[..., Server], number: int) -> None:
    """A rolling update must lose no answer; load balancers look at /readyz."""
    server = start(drain_seconds=60, ends=True)
    url = server.ready()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(number)
        with httpx.Client() as client:
            while client.get(f"{url}/readyz").status_code == 200:
                pass
            for path in ("/readyz", "/health"):
                probe = client.get(url + path)
                assert (probe.status_code, probe.json()["error"]["code"]) == (503, "draining")
            refused = client.post(f"{url}/v1/completions", json={"prompt": [1]})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["connection"] == "close"
            assert client.get(f"{url}/livez").status_code == 200
        server.open_gate()
        rest = [line for line in lines if line]
    assert '"finish_reason":"length"' in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.stop(None) == 0
    assert "Traceback" not in "".join(server.err)


def test_the_engines_end_while_it_drains_is_a_failure(start: Callable[..., Server]) -> None:
    server = start(drain_seconds=60)
    url = server.ready()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: any("may go on for 60 s" in line for line in server.err))
        server.die()
        assert "rank 1 was killed" in [line for line in lines if line][-2]
    assert server.stop(None) == 1


def test_who_only_looks_on_holds_up_no_stop(start: Callable[..., Server]) -> None:
    """An open connection that asks for nothing, and one in the middle of its headers."""
    server = start(drain_seconds=60)
    address = httpx.URL(server.ready())
    with socket.create_connection((address.host, address.port or 0)) as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")
        assert server.stop(signal.SIGTERM) == 0


def test_a_stream_that_outlasts_the_stop_is_told(start: Callable[..., Server]) -> None:
    server = start(drain_seconds=0.3)
    url = server.ready()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert "the engine was closed" in rest[-2]
    assert rest[-1] == "data: [DONE]"
    assert server.stop(None) == 0


def test_a_fatal_error_ends_it_with_an_exit_code_and_one_line(start: Callable[..., Server]) -> None:
    """An orchestrator restarts what exits with an error, and nothing else."""
    server = start()
    url = server.ready()
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": [1], "stream": True}) as response:
        server.die()
        rest = [line for line in response.iter_lines() if line]
    assert "rank 1 was killed" in rest[-2]
    assert server.stop(None) == 1
    assert server.errors() == ["nanoengine: error: rank 1 was killed\n"]
    assert "Traceback" not in "".join(server.err)


def test_a_server_that_is_to_survive_its_engine_says_503_until_it_is_stopped(start: Callable[..., Server]) -> None:
    server = start(options=["--no-exit-on-failure"])
    url = server.ready()
    server.die()
    server.until(lambda: httpx.get(f"{url}/readyz").status_code != 200)
    time.sleep(1)  # in which it would end
    answer = httpx.get(f"{url}/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert server.stop(signal.SIGTERM) == 0
    assert sum("rank 1 was killed" in line for line in server.err) == 1


def test_a_failed_start_is_one_line(start: Callable[..., Server]) -> None:
    server = start(start_fails=True)
    assert server.stop(None, seconds=60) == 1
    assert server.errors() == ["nanoengine: error: more memory is asked for than there is\n"]
    assert "Traceback" not in "".join(server.err)
    assert not server.out


def test_the_front_end_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, launch.supervisor, nanoengine.tokenizer; from launch.server.app import create_app;"
        "sys.exit(', '.join(name for name in ('torch', 'transformers', 'workers') if name in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_it_holds_as_many_connections_as_it_may_have_descriptors() -> None:
    """A soft limit of 1,024, which is usual, must not keep the second thousand of clients out."""
    code = (
        "import resource, sys; from launch.front_end import max_connections;"
        "hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1] % 2**63, 5000);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)); print(max_connections(), hard)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    connections, hard = map(int, done.stdout.split())
    assert connections == hard - 64
