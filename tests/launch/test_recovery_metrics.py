"""What `/metrics` says after faults is what was done and what the clients saw. A real server with two front ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import Counter
from collections.abc import Callable

import httpx
import psutil
import pytest

from tests.launch.prometheus_text import by_label, total
from tests.launch.server_process import ServerProcess
from tests.waiting import PATIENCE, until_async

ASKED = {"prompt": "Tell me a story about Lily", "temperature": 0, "max_tokens": 12, "ignore_eos": True}
# So many scrapes in a row reach both front ends.
BOTH = 10


class Clients:
    """Each request has a connection of its own, so that both front ends get some; `ends` is what became of them."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_keepalive_connections=0)
        self.http = httpx.AsyncClient(base_url=url, verify=False, timeout=2 * PATIENCE, limits=limits)
        self.ends = Counter[str]()

    async def ask(self, **more: object) -> None:
        try:
            answer = await self.http.post("/v1/completions", json=ASKED | more)
        except httpx.TransportError:
            self.ends["broken"] += 1
            return
        self.ends[str(answer.status_code)] += 1
        if answer.status_code == 200:
            assert answer.json()["usage"]["completion_tokens"] == 12

    def several(self, count: int, **more: object) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.ask(**more)) for _ in range(count)]

    async def until(self, condition: Callable[[str], bool], in_a_row: int = 1) -> str:
        """What is shown, once it fulfils the condition so many times in a row."""
        num_right, text = 0, ""
        async with asyncio.timeout(2 * PATIENCE):
            while num_right < in_a_row:
                with contextlib.suppress(httpx.TransportError):  # a front end that dies
                    answer = await self.http.get("/metrics")
                    text = answer.text
                    num_right = num_right + 1 if answer.status_code == 200 and condition(text) else 0
        return text


def children(server: ServerProcess, name: str) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(server.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # one that ended just now
            found += [child] if child.name().startswith(name) else []
    return found


async def held(server: ServerProcess, other_than: int = 0) -> psutil.Process:
    """The rank, which computes nothing from now on, until it is killed: what is asked meanwhile stays open.

    For 10 s; one that has only just been started is waited for six times as long.
    """
    ranks: list[psutil.Process] = []

    def is_there() -> bool:
        ranks.extend(rank for rank in children(server, "nano-worker") if rank.pid != other_than)
        return bool(ranks)

    await until_async(is_there)
    ranks[0].send_signal(signal.SIGSTOP)
    return ranks[0]


def accepted(text: str) -> float:
    return total(text, "requests_accepted_total")


def in_engine(text: str) -> float:
    """Sequences that the scheduler has."""
    return sum(total(text, f"num_requests_{state}") for state in ("running", "waiting", "swapped"))


async def kill_ranks_and_the_scheduler(server: ServerProcess, clients: Clients) -> None:
    """Each under requests, which all are answered."""
    await asyncio.gather(*clients.several(5))
    for number in (1, 2):
        rank = await held(server)
        asked = clients.several(3)
        await clients.until(lambda text, number=number: accepted(text) == 5 + 3 * number)  # type: ignore[misc]
        rank.kill()
        await asyncio.gather(*asked)
        await clients.until(lambda text, number=number: total(text, "worker_restarts_total") == number)  # type: ignore[misc]
    await held(server)
    asked = clients.several(4)
    before = await clients.until(lambda text: accepted(text) == 15 and in_engine(text) == 4)
    children(server, "nano-scheduler")[0].kill()
    await asyncio.gather(*asked)
    after = await clients.until(lambda text: total(text, "scheduler_restarts_total") == 1, BOTH)
    for name in ("iteration_tokens_total_count", "prefill_tokens_total", "worker_restarts_total"):
        assert total(after, name) >= total(before, name) > 0, f"{name} went back"
    assert clients.ends == {"200": 15}


async def end_requests_in_other_ways(server: ServerProcess, clients: Clients) -> None:
    """Too late, by their clients, and with their front end."""
    rank = await held(server)
    await asyncio.gather(*clients.several(2, timeout=0.3))
    leaving = clients.several(2)
    await clients.until(lambda text: accepted(text) == 19)
    for task in leaving:
        task.cancel()
    await asyncio.gather(*leaving, return_exceptions=True)
    await clients.until(lambda text: total(text, "request_success_total", finished_reason="abort") == 2)
    rank.send_signal(signal.SIGCONT)  # it breathes, or it would be taken for dead if all this took ten seconds
    await clients.until(lambda text: in_engine(text) == 0)
    rank = await held(server)
    asked = clients.several(6)
    await clients.until(lambda text: accepted(text) == 25 and in_engine(text) == 6)
    rank.kill()
    rank = await held(server, other_than=rank.pid)
    await clients.until(lambda text: accepted(text) == 25, BOTH)
    os.kill(children(server, "nano-front")[0].pid, signal.SIGKILL)
    await clients.until(lambda text: total(text, "front_end_restarts_total") == 1, BOTH)
    rank.send_signal(signal.SIGCONT)
    await asyncio.gather(*asked)


@pytest.mark.timeout(300)  # on a busy machine each of seven processes may take half a minute to start
async def test_counters_reconcile_after_faults() -> None:
    with ServerProcess("--api-server-count", "2", "--shutdown-timeout", "1") as server:
        clients = Clients(server.wait_ready(2 * PATIENCE))
        async with clients.http:
            await kill_ranks_and_the_scheduler(server, clients)
            await end_requests_in_other_ways(server, clients)

            def at_rest(text: str) -> bool:
                ended = total(text, "request_success_total") + total(text, "request_failure_total")
                return in_engine(text) == 0 and ended == 25 and total(text, "engine_ready") == 1

            text = await clients.until(at_rest, BOTH)
        answered, broken = clients.ends["200"], clients.ends["broken"]
        assert answered + broken == 21
        assert clients.ends["504"] == 2
        success = by_label(text, "request_success_total", "finished_reason")
        assert success == {"stop": 0, "length": answered, "abort": 2}
        assert by_label(text, "request_failure_total", "reason") == {"error": broken, "timeout": 2}
        assert accepted(text) == 25
        restarts = by_label(text, "worker_restarts_total", "reason")
        assert {reason: number for reason, number in restarts.items() if number} == {"died": 3}
        assert by_label(text, "scheduler_restarts_total", "reason")["died"] == 1
        resumed = by_label(text, "requests_resumed_total", "process")
        assert resumed["scheduler"] == 4
        # Three and three, and those of the front end that lived; it is noticed later that the other one is gone.
        assert 6 + answered - 15 <= resumed["worker"] <= 12
        assert total(text, "requests_condemned_total") == total(text, "frames_rejected_total") == 0
        seconds = by_label(text, "recovery_seconds_total", "process")
        assert seconds["worker"] > 0
        assert seconds["scheduler"] > 0
        assert total(text, "kv_cache_usage_perc") == total(text, "kv_blocks", state="used") == 0
        assert server.stop(seconds=PATIENCE) == 0
