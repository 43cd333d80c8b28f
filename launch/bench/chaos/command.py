"""Asks a server for answers of every kind while faults hit it, and compares each answer with an undisturbed one.

The server is a real one, started here. First it is asked in peace, which gives the right answers. Then clients ask on
and on, each time whole, as a stream, as a stream that is broken off and resumed, with an /abort, a hang-up or a timeout
in the middle, while every few seconds a process of the engine is killed or stopped, or something hostile arrives. In
the end nothing may be left, and the server's counts must agree with those of the clients.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from configs.engine import EngineConfig
from configs.errors import ConfigError, EngineError
from launch.bench import processes
from launch.bench.chaos import report
from launch.bench.chaos.clients import WAYS, Clients, Record
from launch.bench.chaos.faults import FAULTS, RESTARTING, Plan, Target
from launch.bench.chaos.traffic import cases
from launch.bench.chaos.watch import Watch
from launch.bench.hardware import hardware, hardware_line
from launch.client.connection import HttpClient
from launch.tied_server import TiedServer

# Those of the server; what follows `--` comes behind them and wins. Few K/V blocks, so that sequences give way to
# others; a short queue, so that a burst overflows it; and resumable streams that are not kept for long.
SERVER_OPTIONS = (
    *("--tp", "2", "--max-queued-requests", "64", "--num-kv-blocks", "160", "--max-num-seqs", "32"),
    *("--stream-resume-seconds", "5", "--no-access-log"),
)
_LOG_LINES = 40
_GONE_SECONDS = 10.0
_SAMPLES = 300


def add_parser(commands: Any) -> None:
    """Declare `chaos`; whatever follows `--` goes to the server."""
    parser = commands.add_parser("chaos", help=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of traffic and faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of requests and faults (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=8, help="that ask at once (default: %(default)s)")
    parser.add_argument(
        "--fault-interval", type=float, default=3.0, metavar="SECONDS",
        help="mean time from the end of one fault to the next (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--faults", nargs="+", choices=tuple(FAULTS), default=list(FAULTS), metavar="NAME",
        help=f"which of {', '.join(FAULTS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--variants", type=int, default=2, help="requests of each kind (default: %(default)s)")
    parser.add_argument("--length", type=int, default=80, help="tokens of an answer, about (default: %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=300.0, metavar="SECONDS",
        help="after which a request, or a recovery, counts as stuck (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--server-log", type=Path, metavar="FILE", help="keep the server's log there")
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="write settings and figures as JSON")
    parser.add_argument("server", nargs="*", metavar="-- SERVER OPTIONS", help="options of `python -m launch`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run and print. Returns 0; 1 when anything was wrong; 130 when interrupted.

    Raises:
        ConfigError: settings that cannot be.
        NanoEngineError: the server does not start, or does not even answer in peace.
    """
    options = [*SERVER_OPTIONS, *arguments.server]
    config = _check(arguments, options)
    print(hardware_line(), flush=True)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine, notes = hardware(), report.Notes(Record())
    with _log_file(arguments.server_log) as log:
        try:
            _run_server(arguments, config, options, notes, log)
        except BaseException:
            _show_log(log)
            raise
        summary = report.figures(notes)
        print(report.render(summary))
        if summary["problems"]:
            _show_log(log)
    if arguments.output is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("run", "command")}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
        whole = {"started": started, "machine": machine, "settings": settings, "server_options": options, **summary}
        arguments.output.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 130 if notes.interrupted else int(bool(summary["problems"]))


def _check(arguments: argparse.Namespace, options: list[str]) -> EngineConfig:
    """The server's settings. Raises ConfigError."""
    from launch.cli import parse

    for name, above in (("minutes", 0), ("fault_interval", 0), ("patience", 0)):
        value = getattr(arguments, name)
        if not value > above:
            raise ConfigError(f"--{name.replace('_', '-')} must be greater than {above}, got {value:g}", name)
    for name in ("clients", "variants", "length"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(arguments, name)}", name)
    for name in ("output", "server_log"):
        file = getattr(arguments, name)
        if file is not None and not file.parent.is_dir():
            raise ConfigError(f"--{name.replace('_', '-')}: there is no folder {file.parent}", name)
    config: EngineConfig = parse(options).resolve()
    ending = sorted(RESTARTING & set(arguments.faults))
    if config.parallel.max_restarts == 0 and ending:
        raise ConfigError(
            f"--faults {ending[0]} needs a server that recovers, and with --max-restarts 0 it does not", "faults"
        )
    if not os.path.isdir("/proc"):
        raise ConfigError("chaos needs Linux: it finds the server's processes in /proc")
    return config


@contextlib.contextmanager
def _log_file(path: Path | None) -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() if path is None else path.open("w+b") as file:
        yield file


def _show_log(log: IO[bytes]) -> None:
    """The last lines of what the server said."""
    log.seek(0)
    lines = log.read().decode(errors="replace").splitlines()
    print("\n".join(["the server's last words:", *lines[-_LOG_LINES:]]), file=sys.stderr)


# -- the server -------------------------------------------------------------------------------------------------


def _run_server(
    arguments: argparse.Namespace, config: EngineConfig, options: list[str], notes: report.Notes, log: IO[bytes]
) -> None:
    """Start it, let everything happen, end it, and note what is left."""
    memory = _shared_memory()
    # Directly below /tmp where there is one: the path of a socket may not be long.
    with tempfile.TemporaryDirectory(prefix="nano-chaos-", dir="/tmp" if os.path.isdir("/tmp") else None) as name:
        base = Path(name)
        variables = {"XDG_RUNTIME_DIR": name, "TMPDIR": name}
        with TiedServer(["--log-level", "info", *options], variables, log) as server:
            asyncio.run(Chaos(arguments, config, server, base, notes).run())
            died = not server.is_alive
        if died:
            notes.problems.append(f"the server ended by itself, with exit code {server.exit_code}")
        elif server.exit_code != 0:
            notes.problems.append(f"the server was stopped, and its exit code is {server.exit_code}")
        notes.problems += _left_behind(base, memory, server.url)


def _left_behind(base: Path, memory: set[str], url: str) -> list[str]:
    """What is still there of a server that has ended, after it had some time."""
    deadline = time.monotonic() + _GONE_SECONDS
    while left := _leftovers(base, memory, url):
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left


def _leftovers(base: Path, memory: set[str], url: str) -> list[str]:
    # The server's processes have the directory in their environment, and nobody else has.
    left = processes.with_variable("XDG_RUNTIME_DIR", str(base))
    found = [f"left behind: process {pid} ({processes.name(pid)})" for pid in left]
    found += [f"left behind: {path.name} in the run directory" for path in base.iterdir()]
    found += [f"left behind: /dev/shm/{each}" for each in sorted(_shared_memory() - memory)]
    with socket.socket() as probe:
        port = int(url.rpartition(":")[2])
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            found.append(f"left behind: somebody listens on port {port}")
    return found


def _shared_memory() -> set[str]:
    """What of /dev/shm may be ours: files of this user, but no semaphores, of which we make none."""
    with contextlib.suppress(OSError):
        entries = [entry for entry in os.scandir("/dev/shm") if not entry.name.startswith("sem.")]
        return {entry.name for entry in entries if entry.stat().st_uid == os.getuid()}
    return set()


# -- the run ----------------------------------------------------------------------------------------------------


class Chaos:
    """One run against a server that is ready. Fills `notes`."""

    def __init__(
        self, arguments: argparse.Namespace, config: EngineConfig, server: TiedServer, base: Path, notes: report.Notes
    ) -> None:
        self._arguments, self._server, self._notes = arguments, server, notes
        self._config, self._base = config, base

    async def run(self) -> None:
        """Ask in peace, then under faults, then let everything come to its end and look at the server's counts."""
        arguments, notes = self._arguments, self._notes
        http = HttpClient(self._server.url)
        clients = Clients(http, notes.record, arguments.patience)
        target = Target(
            self._server.pid, self._config.parallel.world_size, self._base, http, clients, arguments.patience,
            notes.problems, notes.recoveries, notes.hits,
        )  # fmt: skip
        seconds = 60 * arguments.minutes
        watch = Watch(self._server.pid, max(1.0, seconds / _SAMPLES), lambda: http.num_connections)
        try:
            await self._ask_in_peace(clients)
            await self._ask_under_faults(clients, target, watch, seconds)
            if self._server.is_alive:
                await self._come_to_rest(http)
                notes.metrics = await _get(http, "/metrics")
        except asyncio.CancelledError:
            notes.interrupted = True
        finally:
            notes.samples = watch.samples
            http.close()

    async def _ask_in_peace(self, clients: Clients) -> None:
        """The right answers. Raises EngineError when there are none: then nothing can be compared."""
        arguments = self._arguments
        todo = collections.deque(cases(arguments.seed, arguments.variants, arguments.length))
        dice = random.Random(arguments.seed)

        async def work() -> None:
            while todo:
                outcome = await clients.ask(todo.popleft(), "whole", dice)
                if not outcome.is_good:
                    raise EngineError(f"{outcome.case.kind}: {outcome.result} before any fault: {outcome.detail}")

        async with asyncio.TaskGroup() as group:
            for _ in range(arguments.clients):
                group.create_task(work())

    async def _ask_under_faults(self, clients: Clients, target: Target, watch: Watch, seconds: float) -> None:
        arguments, notes = self._arguments, self._notes
        asked = list(clients.expected)
        tasks = [
            asyncio.create_task(clients.ask_on(asked, WAYS, random.Random(f"{arguments.seed} {number}")))
            for number in range(arguments.clients)
        ]
        tasks.append(asyncio.create_task(watch.look_on()))
        since = time.monotonic()
        try:
            await self._strike_on(target, since + seconds)
        except asyncio.CancelledError:
            clients.hang_up()
            raise
        finally:
            notes.seconds = time.monotonic() - since
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception):
                    notes.problems.append(f"this program failed: {type(ended).__name__}: {ended}")

    async def _strike_on(self, target: Target, until: float) -> None:
        arguments, dice = self._arguments, random.Random(f"faults {self._arguments.seed}")
        plan = Plan(arguments.faults, arguments.fault_interval, dice)
        while self._server.is_alive:
            pause, name = plan.next()
            await asyncio.sleep(min(pause, max(0.0, until - time.monotonic())))
            if time.monotonic() >= until:
                return
            self._notes.faults[name] += 1
            try:
                await FAULTS[name](target, dice)
            except EngineError as error:
                target.problems.append(f"{name}: {error.message}")
                return

    async def _come_to_rest(self, http: HttpClient) -> None:
        """Wait until the engine has nothing open: streams that nobody resumed end by themselves."""
        deadline = time.monotonic() + self._arguments.patience
        while json.loads(await _get(http, "/load"))["server_load"]:
            if time.monotonic() > deadline:
                self._notes.problems.append("requests are still open although no client waits")
                return
            await asyncio.sleep(0.1)


async def _get(http: HttpClient, path: str) -> str:
    async with http.request("GET", path) as response:
        return (await response.read(2**24)).decode()
