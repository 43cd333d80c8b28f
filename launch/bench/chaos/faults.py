"""What is done to the server while it is asked: signals to its processes, and what nobody means well with.

It finds the processes by the names that the kernel shows, and the front socket in the run directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgpack
import zmq

from configs.errors import EngineError
from launch.bench import processes
from launch.bench.chaos.clients import Clients
from launch.bench.chaos.traffic import COMPLETIONS, hostile_requests
from launch.client.connection import ClientError, HttpClient
from nanoengine.messages import Hello, encode

BURST = 100
_POLL_SECONDS = 0.02
_ANSWER_SECONDS = 30.0


@dataclasses.dataclass
class Target:
    """The server under test.

    Attributes:
        root: its first process.
        num_ranks: how many compute.
        run_base: where its run directories are.
        problems: what faults were answered with that should not be.
        recoveries: seconds from each fault that ended processes until requests were taken again.
        hits: when such a fault came, by `time.monotonic`.
    """

    root: int
    num_ranks: int
    run_base: Path
    http: HttpClient
    clients: Clients
    patience: float
    problems: list[str] = dataclasses.field(default_factory=list)
    recoveries: list[float] = dataclasses.field(default_factory=list)
    hits: list[float] = dataclasses.field(default_factory=list)

    def named(self, prefix: str) -> list[int]:
        """Its processes whose name begins so, in the order of their names."""
        found = [(processes.name(pid), pid) for pid in processes.tree(self.root)]
        return [pid for name, pid in sorted(found) if name.startswith(prefix)]

    @property
    def ranks(self) -> list[int]:
        """Those that compute; spare ones are not among them."""
        return self.named("nano-worker")

    @property
    def scheduler(self) -> list[int]:
        """One, or none while it is replaced."""
        return self.named("nano-scheduler")

    def hit(self, pids: list[int], number: signal.Signals) -> None:
        """Send a signal; those that have ended meanwhile need none."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    async def at_work(self) -> list[int]:
        """The ranks, once all of them are there: on a busy machine they may fail by themselves.

        Raises:
            EngineError: they do not come.
        """
        deadline = time.monotonic() + self.patience
        while len(ranks := self.ranks) < self.num_ranks or not await self.is_ready():
            if time.monotonic() > deadline or not processes.alive(self.root):
                raise EngineError(f"the ranks that a fault is to hit are not there: {ranks}")
            await asyncio.sleep(_POLL_SECONDS)
        return ranks

    async def recovered(self, before: list[int], since: float) -> None:
        """Wait until others have taken the place of the processes `before` and requests are taken again."""
        self.hits.append(since)
        deadline = since + self.patience
        # In this order: just after a fault nobody has noticed it, and /readyz still says what was true before.
        while any(map(processes.alive, before)) or len(self.ranks) < self.num_ranks or not await self.is_ready():
            if not processes.alive(self.root):
                return
            if time.monotonic() > deadline:
                self.problems.append(f"not ready again {self.patience:g} s after a fault")
                return
            await asyncio.sleep(_POLL_SECONDS)
        self.recoveries.append(time.monotonic() - since)

    async def is_ready(self) -> bool:
        """What /readyz says."""
        try:
            async with self.http.request("GET", "/readyz") as response:
                await response.read(2**16)
                return response.status == 200
        except ClientError:
            return False


Act = Callable[[Target, random.Random], Awaitable[None]]


async def kill_rank(target: Target, dice: random.Random) -> None:
    await _strike(target, [dice.choice(await target.at_work())], signal.SIGKILL)


async def stop_rank(target: Target, dice: random.Random) -> None:
    """As a collective that hangs; the engine must notice, and end the rank itself."""
    await _strike(target, [dice.choice(await target.at_work())], signal.SIGSTOP)


async def kill_rank_twice(target: Target, dice: random.Random) -> None:
    """The second one while the engine recovers from the first, or just after."""
    before, since = await target.at_work(), time.monotonic()
    target.hit([dice.choice(before)], signal.SIGKILL)
    while not (new := [pid for pid in target.ranks if pid not in before]):
        if not processes.alive(target.root):
            return
        if time.monotonic() > since + target.patience:
            target.problems.append(f"no new ranks {target.patience:g} s after one was killed")
            return
        await asyncio.sleep(_POLL_SECONDS)
    await asyncio.sleep(dice.uniform(0, 1.5))
    second = dice.choice(target.ranks or new)
    target.hit([second], signal.SIGKILL)
    await target.recovered([*before, second], since)


async def kill_scheduler(target: Target, dice: random.Random) -> None:
    await target.at_work()
    await _strike(target, target.scheduler, signal.SIGKILL)


async def stop_scheduler(target: Target, dice: random.Random) -> None:
    """It is silent from then on; its owner must notice, and end it."""
    await target.at_work()
    await _strike(target, target.scheduler, signal.SIGSTOP)


async def kill_scheduler_and_rank(target: Target, dice: random.Random) -> None:
    rank = dice.choice(await target.at_work())
    await _strike(target, [*target.scheduler, rank], signal.SIGKILL)


async def _strike(target: Target, victims: list[int], number: signal.Signals) -> None:
    """Hit them, and wait for the recovery. Whichever it was, no rank survives it: they live and die together."""
    since, before = time.monotonic(), target.ranks
    target.hit(victims, number)
    await target.recovered([*before, *victims], since)


async def be_hostile(target: Target, dice: random.Random) -> None:
    """Requests that are refused, each with a 4xx."""
    for path, body in hostile_requests(dice):
        try:
            async with asyncio.timeout(_ANSWER_SECONDS), target.http.request("POST", path, body) as response:
                told = await response.read(2**20)
        except (ClientError, TimeoutError) as error:
            told_error = error.message if isinstance(error, ClientError) else f"no answer in {_ANSWER_SECONDS:g} s"
            target.problems.append(f"a hostile request to {path}: {told_error}")
            continue
        if not 400 <= response.status < 500 and b'"recovering"' not in told:
            target.problems.append(f"a hostile request to {path} was answered {response.status}: {told[:200]!r}")


async def hang_up(target: Target, dice: random.Random) -> None:
    """Sixteen clients at once that begin and go, some in the middle of a request."""

    async def begin_and_go() -> None:
        _, writer = await asyncio.open_connection(*target.http.address)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
        sent = head.encode() + b'99\r\n\r\n{"prompt": "x", "stream": true, "max_tokens": 500'
        writer.write(sent[: dice.randrange(1, len(sent))])
        with contextlib.suppress(OSError):
            await writer.drain()
            await asyncio.sleep(dice.uniform(0, 0.3))
        writer.transport.abort()

    with contextlib.suppress(OSError):
        await asyncio.gather(*(begin_and_go() for _ in range(16)))


async def send_garbage(target: Target, dice: random.Random) -> None:
    """To the socket at which the scheduler listens to front ends, as any process of this user could."""
    for path in target.run_base.glob("nanoengine-*/front"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
            raw.setblocking(False)
            raw.connect(str(path))
            raw.send(dice.randbytes(300))
        context = zmq.Context()
        try:
            dealer = context.socket(zmq.DEALER)
            dealer.connect(f"ipc://{path}")
            for frames in _garbage(dice):
                with contextlib.suppress(zmq.Again):
                    dealer.send_multipart(frames, zmq.NOBLOCK)
            await asyncio.sleep(0.2)
            dealer.close(0)
        finally:
            context.term()


def _garbage(dice: random.Random) -> list[list[bytes]]:
    greeting = encode(Hello("chaos"))
    garbage = [[dice.randbytes(dice.randrange(200))] for _ in range(40)]
    garbage += [[greeting[: dice.randrange(len(greeting))]] for _ in range(5)]
    odd: list[object] = [None, [], {}, [2**63], ["x"] * 9, [1, [[]]], [99, "x"], [[1]]]
    garbage += [[msgpack.packb(thing)] for thing in odd]
    garbage += [[greeting, greeting], [b""] * 5, [bytes(2**20)], [b"\xdd\xff\xff\xff\xff"], [b"\x91" * 5000]]
    dice.shuffle(garbage)
    return garbage


async def burst(target: Target, dice: random.Random) -> None:
    """More requests at once than may wait: each is answered, or refused at once."""
    cases = [case for case in target.clients.expected if case.kind == "greedy"]
    await asyncio.gather(*(target.clients.ask(dice.choice(cases), "whole", dice, insist=False) for _ in range(BURST)))
    target.http.close()  # of the connections that it kept for reuse, there are too many now


FAULTS: dict[str, Act] = {
    "kill-rank": kill_rank,
    "stop-rank": stop_rank,
    "kill-rank-twice": kill_rank_twice,
    "kill-scheduler": kill_scheduler,
    "stop-scheduler": stop_scheduler,
    "kill-scheduler-and-rank": kill_scheduler_and_rank,
    "hostile-requests": be_hostile,
    "hang-up": hang_up,
    "garbage": send_garbage,
    "burst": burst,
}
# A server whose engine gives up at the first failure cannot survive these.
RESTARTING = frozenset(name for name in FAULTS if name.startswith(("kill", "stop")))


class Plan:
    """Which fault comes when: each of them once in every round, in random order."""

    def __init__(self, names: list[str], every: float, dice: random.Random) -> None:
        self._names, self._every, self._dice = names, every, dice
        self._round: list[str] = []

    def next(self) -> tuple[float, str]:
        """Seconds to wait, and the fault that comes then."""
        if not self._round:
            self._round = self._dice.sample(self._names, len(self._names))
        return self._every * self._dice.uniform(0.5, 1.5), self._round.pop()
