"""What `/metrics` says after faults is what was done and what the clients saw. A real server with two front ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable

import httpx
import psutil

from tests.launch.prometheus_text import by_label, total
from tests.launch.server_process import ServerProcess

ASKED = {"prompt": "Tell me a story about Lily", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
SECONDS = 60.0


def children(server: ServerProcess, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            found += [child] if child.name().startswith(name) else []
    return found


class Clients:
    """Each request on a connection of its own, so that both front ends get some; `ends` is what became of them."""

    def __init__(self, url: str) -> None:
        self.url, self.ends = url, Counter[str]()

    async def ask(self, **more: object) -> None:
        async with httpx.AsyncClient(base_url=self.url, verify=False, timeout=60) as client:
            try:
                answer = await client.post("/v1/completions", json=ASKED | more)
            except httpx.TransportError:
                self.ends["broken"] += 1
                return
        self.ends[str(answer.status_code)] += 1
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 12

    def several(self, count: int, **more: object) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.ask(**more)) for _ in range(count)]

    async def until(self, condition: Callable[[str], bool]) -> str:
        """What both front ends show, once it fulfils the condition: so many scrapes in a row reach both."""
        deadline, num_right, text = time.monotonic() + SECONDS, 0, ""
        while num_right < 12:
            async with httpx.AsyncClient(base_url=self.url, verify=False, timeout=60) as client:
                with contextlib.suppress(httpx.TransportError):  # a front end that dies
                    text = (await client.get("/metrics")).text
                    num_right = num_right + 1 if condition(text) else 0
            assert time.monotonic() < deadline, text
        return text

    async def until_accepted(self, count: int) -> None:
        await self.until(lambda text: total(text, "requests_accepted_total") == count)


def in_engine(text: str) -> float:
    """Sequences that the scheduler has."""
    return sum(total(text, f"num_requests_{state}") for state in ("running", "waiting", "swapped"))


async def held(server: ServerProcess) -> psutil.Process:
    """The rank, which computes nothing from now on, until it is killed: what is asked meanwhile stays open."""
    deadline = time.monotonic() + SECONDS
    while not (ranks := children(server, "nano-worker")):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    ranks[0].send_signal(signal.SIGSTOP)
    return ranks[0]


async def test_counters_reconcile_after_faults() -> None:
    with ServerProcess("--api-server-count", "2", "--shutdown-timeout", "1") as server:
        clients = Clients(server.wait_ready())
        await asyncio.gather(*clients.several(5))

        for number in (1, 2):  # ranks die under three requests each time
            rank = await held(server)
            asked = clients.several(3)
            await clients.until_accepted(5 + 3 * number)
            rank.kill()
            await asyncio.gather(*asked)
            await clients.until(lambda text, number=number: total(text, "worker_restarts_total") == number)  # type: ignore[misc]
        assert clients.ends == {"200": 11}

        rank = await held(server)
        await asyncio.gather(*clients.several(2, timeout=0.3))  # these come too late
        hanging_up = clients.several(2)
        await clients.until_accepted(15)
        for task in hanging_up:
            task.cancel()
        await asyncio.gather(*hanging_up, return_exceptions=True)
        await clients.until(lambda text: total(text, "request_success_total", finished_reason="abort") == 2)
        # It breathes, or the scheduler would take it for dead by its silence if all this took ten seconds.
        rank.send_signal(signal.SIGCONT)
        await clients.until(lambda text: in_engine(text) == 0)
        rank = await held(server)
        broken = clients.several(6)
        await clients.until(lambda text: total(text, "requests_accepted_total") == 21 and in_engine(text) == 6)
        os.kill(children(server, "nano-front")[0].pid, signal.SIGKILL)

        def is_replaced(text: str) -> bool:
            is_counted = total(text, "front_end_restarts_total") == total(text, "engine_ready") == 1
            return is_counted and in_engine(text) == 6 - clients.ends["broken"]

        await clients.until(is_replaced)
        rank.kill()
        await asyncio.gather(*broken)

        def at_rest(text: str) -> bool:
            ended = total(text, "request_success_total") + total(text, "request_failure_total")
            return in_engine(text) == 0 and ended == 21 and total(text, "engine_ready") == 1

        text = await clients.until(at_rest)
        assert clients.ends["200"] + clients.ends["broken"] == 17
        assert clients.ends["504"] == 2
        success = by_label(text, "request_success_total", "finished_reason")
        assert success == {"stop": 0, "length": clients.ends["200"], "abort": 2}
        failed = by_label(text, "request_failure_total", "reason")
        assert failed == {"error": clients.ends["broken"], "timeout": 2}
        assert total(text, "requests_accepted_total") == 21
        restarts = by_label(text, "worker_restarts_total", "reason")
        assert {reason: number for reason, number in restarts.items() if number} == {"died": 3}
        assert total(text, "requests_resumed_total") == 6 + (clients.ends["200"] - 11)
        assert total(text, "requests_condemned_total") == total(text, "frames_rejected_total") == 0
        assert 0 < total(text, "recovery_seconds_total") < 3 * SECONDS
        assert total(text, "kv_cache_usage_perc") == total(text, "kv_blocks", state="used") == 0
        assert server.stop(seconds=10) == 0
