"""Measures a front end alone: what a streamed token costs it, and how soon it answers a probe meanwhile.

The front end is the real process (HTTP, journal, detokeniser, SSE); the engine behind it computes nothing
(`instant_engine.py`) and hands out a token to each stream at a given rate. Clients and engine are other processes, so
with two cores or fewer they share them with it. "tokens per core" is what was delivered for each second of CPU time of
the front end, the kernel's share for its sockets included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

from configs.engine import EngineConfig
from configs.errors import EngineError
from launch.bench import processes
from launch.bench.figures import percentile, table
from launch.bench.instant_engine import RATE_VARIABLE
from launch.front_group import FrontEndProcess
from launch.keys import ApiKeys
from launch.listener import listening
from launch.options import real, whole
from nanoengine.engine_process import EngineProcess
from nanoengine.processes import set_death_signal

_MODULE = "launch.bench.instant_engine"
_WARM_UP_SECONDS = 1.0
_PROBE_SECONDS = 0.02
_HEADER = ["streams", "asked/s", "tokens/s", "events/s", "CPU %", "tokens per core", "livez p50", "p99", "max ms"]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare `front-end`."""
    parser = commands.add_parser("front-end", help=__doc__.splitlines()[0])
    parser.add_argument(
        "--streams", type=whole(1), nargs="+", default=[16, 64, 256], help="open at once (default: 16 64 256)"
    )
    parser.add_argument(
        "--rate", type=real(above=0), nargs="+", default=[2000, 10000], help="tokens a second over all streams"
    )
    parser.add_argument(
        "--seconds", type=real(above=0), default=5, help="how long each combination is measured (default: 5)"
    )
    parser.add_argument(
        "--crowd", action="store_true", help="measure from the moment on when all streams are asked for at once"
    )
    parser.add_argument("--chat", action="store_true", help="chat completions instead of completions")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure each combination and print a table."""
    print(f"load average {os.getloadavg()[0]:.1f} at the start, {os.cpu_count()} cores, times in ms\n")
    rows = []
    for streams in arguments.streams:
        for rate in arguments.rate:
            with _served(rate, streams) as (front, port):
                rows.append(asyncio.run(_measure(front, port, streams, rate, arguments)))
    print(table(_HEADER, rows))


@contextlib.contextmanager
def _served(rate: float, streams: int) -> Iterator[tuple[FrontEndProcess, int]]:
    """A front end over an instant engine, and its port."""
    os.environ[RATE_VARIABLE] = str(rate)
    settings = {"port": 0, "max_queued_requests": max(4096, streams), "log_level": "warning", "shutdown_timeout": 0.0}
    config = EngineConfig.create(**settings).resolve()
    engine = EngineProcess(config, module=_MODULE)
    with contextlib.ExitStack() as stack:
        (listener,) = stack.enter_context(listening(config.server, False))
        stack.callback(engine.stop)
        engine.start()
        front = FrontEndProcess(config, listener, ApiKeys(), engine.run_dir, engine.run_dir / "fronts", 1)
        stack.callback(front.end)
        engine.wait_ready(60)
        front.tell(engine.look())
        while not front.is_ready:
            front.wait(1)
            front.read()
            if front.exit_code is not None:
                raise EngineError(f"the front end ended: {front.failure or front.exit_code}")
        yield front, listener.getsockname()[1]


@dataclasses.dataclass
class _Counts:
    num_events: int = 0
    num_tokens: int = 0


class _Stream(asyncio.Protocol):
    """Counts the events of a stream that was asked for on its connection; asks again when it ends."""

    def __init__(self, request: bytes, counts: _Counts) -> None:
        self._request, self._counts = request, counts
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._counts.num_events += data.count(b"data: {")
        # Each event names the ids that it brings: `"token_ids":[5,6]`.
        for part in data.split(b'"token_ids":[')[1:]:
            ids = part[: part.index(b"]")]
            self._counts.num_tokens += ids.count(b",") + bool(ids)
        if b"data: [DONE]" in data:
            assert self._transport is not None
            self._transport.write(self._request)


async def _measure(
    front: FrontEndProcess, port: int, streams: int, rate: float, arguments: argparse.Namespace
) -> list[str]:
    loop = asyncio.get_running_loop()
    counts, request = _Counts(), _request(arguments.chat)
    # In a process of its own: a client that is busy counting would not notice an answer at once.
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawning, _end_with, (os.getpid(),)) as pool:
        await loop.run_in_executor(pool, _probe, port, _PROBE_SECONDS)
        open_streams = [
            (await loop.create_connection(lambda: _Stream(request, counts), "127.0.0.1", port))[0]
            for _ in range(streams)
        ]
        if not arguments.crowd:
            for stream in open_streams:
                stream.write(request)
            await asyncio.sleep(_WARM_UP_SECONDS)
        before, cpu, began = dataclasses.replace(counts), processes.cpu_seconds([front.pid]), time.perf_counter()
        probing = loop.run_in_executor(pool, _probe, port, arguments.seconds)
        if arguments.crowd:
            for stream in open_streams:
                stream.write(request)
        latencies = sorted(await probing)
    seconds = time.perf_counter() - began
    cpu = processes.cpu_seconds([front.pid]) - cpu
    tokens, events = counts.num_tokens - before.num_tokens, counts.num_events - before.num_events
    for stream in open_streams:
        stream.close()
    probes = [f"{1000 * percentile(latencies, share):.1f}" for share in (0.5, 0.99, 1)]
    figures = [streams, rate, tokens / seconds, events / seconds, 100 * cpu / seconds, tokens / max(cpu, 0.01)]
    return [*(f"{figure:.0f}" for figure in figures), *probes]


def _end_with(parent_pid: int) -> None:
    if not set_death_signal(signal.SIGKILL, parent_pid):
        os._exit(1)  # it is gone already


def _probe(port: int, seconds: float) -> list[float]:
    """Seconds that /livez took, asked for again and again on one connection."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        latencies, end = [], time.perf_counter() + seconds
        while (now := time.perf_counter()) < end:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                received = connection.recv(4096)
                if not received:
                    raise EngineError("the front end hung up on a probe")
                answer += received
            latencies.append(time.perf_counter() - now)
            time.sleep(_PROBE_SECONDS)
    return latencies


def _request(chat: bool) -> bytes:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked: dict[str, object] = {"messages": [{"role": "user", "content": "Hi"}]} if chat else {"prompt": "Once upon"}
    asked |= {"stream": True, "max_tokens": 500, "ignore_eos": True, "return_token_ids": True}
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
