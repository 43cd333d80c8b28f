"""Measures a server's life: command to ready, to the first answer, at rest, and from SIGTERM to nothing left.

It sees the server from outside, as an operator does: its output, its port, and what the kernel says of it.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from typing import Any

from configs.errors import EngineError
from launch import cli
from launch.bench import processes
from launch.options import real, whole
from nanoengine._packages import child_environment

READY = re.compile(r"nanoengine ready: (http://\S+)")


def add_parser(commands: Any) -> None:
    """Declare `lifecycle`; whatever follows `--` goes to the server."""
    parser = commands.add_parser("lifecycle", help=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=whole(1), default=5, help="starts to measure (default: %(default)s)")
    parser.add_argument(
        "--idle-seconds", type=real(0), default=30, help="how long to watch the idle server, in the last run"
    )
    parser.add_argument("server", nargs="*", metavar="-- SERVER OPTIONS", help="options of `python -m launch`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print; medians and the range over the runs.

    Raises:
        ConfigError: the server's options cannot be.
        EngineError: the server does not start.
    """
    cli.parse(arguments.server).resolve()
    rows = []
    for number in range(arguments.runs):
        last = number == arguments.runs - 1
        rows.append(measure(arguments.server, arguments.idle_seconds if last else 0))
    for name in ("ready_s", "first_answer_s", "gone_s"):
        values = [row[name] for row in rows]
        print(f"{name:16} median {statistics.median(values):.2f}, from {min(values):.2f} to {max(values):.2f}")
    for name in ("processes", "pss_mib", "idle_percent_of_a_core", "left_over"):
        print(f"{name:16} {rows[-1][name]}")


def measure(options: list[str], idle_seconds: float) -> dict[str, Any]:
    """One start, one answer, some rest, one end."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "launch", "--port", "0", *options]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=child_environment())
    try:
        address = _address(server)
        ready = time.perf_counter() - started
        asked = time.perf_counter()
        _ask(address)
        answered = time.perf_counter() - asked
        pids = processes.tree(server.pid)
        memory = processes.proportional_memory(pids)
        before = processes.cpu_seconds(pids)
        time.sleep(idle_seconds)
        used = processes.cpu_seconds(pids) - before
        ended = time.perf_counter()
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        gone = time.perf_counter() - ended
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    return {
        "ready_s": ready,
        "first_answer_s": answered,
        "gone_s": gone,
        "processes": len(pids),
        "pss_mib": memory // 2**20,
        "idle_percent_of_a_core": round(100 * used / idle_seconds, 2) if idle_seconds else None,
        "left_over": [pid for pid in pids if processes.alive(pid)],
    }


def _address(server: subprocess.Popen[str]) -> str:
    assert server.stdout is not None
    for line in server.stdout:
        if match := READY.match(line):
            return match[1]
    raise EngineError(f"the server ended before it was ready, with exit code {server.wait()}")


def _ask(address: str) -> None:
    with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "中国的首都是", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        json.load(response)
