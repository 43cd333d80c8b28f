"""The scheduler is killed and stopped under 16 streams of every kind: each equals the undisturbed run byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from typing import Any

import psutil
import pytest

from nanoengine import AsyncLLM
from tests.end_to_end.disturbed_streams import Gaps, Hit, ranks_of, report, rounds, run
from tests.nanoengine.process_tools import open_descriptors, shared_memory
from tests.waiting import until_async


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


async def scheduler(llm: AsyncLLM, dice: random.Random) -> None:
    kill(llm._engine.pid)  # type: ignore[attr-defined]


async def stop(llm: AsyncLLM, dice: random.Random) -> None:
    kill(llm._engine.pid, signal.SIGSTOP)  # type: ignore[attr-defined]


async def everybody(llm: AsyncLLM, dice: random.Random) -> None:
    """A rank and the scheduler at once, in either order."""
    pids = [dice.choice(ranks_of(llm) or [0]), llm._engine.pid]  # type: ignore[attr-defined]
    for pid in dice.sample([pid for pid in pids if pid], len(pids)):
        kill(pid)


async def twice(llm: AsyncLLM, dice: random.Random) -> None:
    """The scheduler, and the next one while it starts."""
    first = llm._engine.pid  # type: ignore[attr-defined]
    kill(first)
    await until_async(lambda: llm._engine.pid != first)  # type: ignore[attr-defined]
    await asyncio.sleep(dice.uniform(0, 1.5))
    kill(llm._engine.pid)  # type: ignore[attr-defined]


async def then_a_rank(llm: AsyncLLM, dice: random.Random) -> None:
    """The scheduler, and a rank of the next one as soon as there is one."""
    first = llm._engine.pid  # type: ignore[attr-defined]
    kill(first)
    await until_async(lambda: llm._engine.pid != first)  # type: ignore[attr-defined]
    with contextlib.suppress(psutil.NoSuchProcess):
        await until_async(lambda: ranks_of(llm) or llm.is_ready)
        kill(dice.choice(ranks_of(llm)))


async def disturbed(hits: list[Hit], dice: random.Random, **settings: Any) -> Gaps:
    memory = shared_memory()
    async with AsyncLLM("demo", device="cpu", **settings) as llm:
        await run(llm, 80, Gaps(), None)
        num_descriptors = len(open_descriptors())
        gaps = await rounds(llm, hits, dice)
        assert llm.restart_stats.requests_resumed > 0
        await until_async(lambda: len(open_descriptors()) == num_descriptors)
        assert len(os.listdir(llm.run_dir)) == 2, "the lock, and the directory of the scheduler that serves"
        print(f"\n{dict(llm.restart_stats.restarts)}, {llm.restart_stats.seconds:.1f} s without a scheduler")
    assert {name for name in shared_memory() - memory if "nanoengine" in name} == set()
    return gaps


async def test_streams_survive_a_killed_scheduler_one_that_dies_as_it_starts_and_one_that_dies_with_a_rank() -> None:
    await disturbed([twice, everybody], random.Random(1))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("hit", "times", "tp"),
    [(scheduler, 50, 1), (scheduler, 50, 2), (twice, 20, 2), (then_a_rank, 20, 2), (everybody, 20, 2), (stop, 20, 2)],
)
async def test_800_streams_survive_schedulers_that_are_gone(hit: Hit, times: int, tp: int) -> None:
    # Schedulers that are hit before they bring a token count: by default the fifth within a minute ends the engine.
    gaps = await disturbed([hit] * times, random.Random(tp), tensor_parallel_size=tp, max_restarts=times)
    report(gaps, f"{times} times {hit.__name__} at tp {tp}")
