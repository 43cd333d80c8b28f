"""Ranks are killed and stopped under 16 streams of every kind: each one equals the undisturbed run byte for byte."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
from typing import Any

import pytest

from nanoengine import AsyncLLM
from tests.end_to_end.disturbed_streams import Gaps, Hit, ranks_of, report, rounds


def hits(number: signal.Signals, further: int = 0) -> Hit:
    """Send a signal to a random rank; `further` ones follow within the next recovery."""

    async def hit(llm: AsyncLLM, dice: random.Random) -> None:
        for times in range(1 + further):
            await asyncio.sleep(dice.uniform(0, 1.5) if times else 0)
            ranks = ranks_of(llm)
            if ranks:
                os.kill(dice.choice(ranks), number)

    return hit


async def disturbed(times: int, hit: Hit, seed: int, pause: float = 0, **settings: Any) -> Gaps:
    async with AsyncLLM("demo", device="cpu", **settings) as llm:
        gaps = await rounds(llm, [hit] * times, random.Random(seed), pause=pause)
        assert llm.facts is not None
        assert llm.facts.group > times
        return gaps


@pytest.mark.parametrize(("tp", "further", "warm_spare"), [(1, 0, True), (2, 1, False)])
async def test_streams_survive_killed_ranks(tp: int, further: int, warm_spare: bool) -> None:
    """`further` kills come while the engine recovers, or just after."""
    hit = hits(signal.SIGKILL, further)
    await disturbed(1, hit, tp + further, tensor_parallel_size=tp, warm_spare=warm_spare)


async def test_streams_survive_a_stopped_rank_and_the_log_names_it(capfd: pytest.CaptureFixture[str]) -> None:
    await disturbed(1, hits(signal.SIGSTOP), 3, tensor_parallel_size=2, step_timeout=1.5)
    log = capfd.readouterr().err
    found = re.search(r"epoch 1\.1 failed: .*?(rank [01]) \([a-z0-9 .]+\), stopped by a signal", log)
    assert found, log
    assert f"{found[1]} (computing step" in log
    assert "Current thread" in log
    assert "model_runner.py" in log or "parallel" in log


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("tp", "warm_spare"), [(1, False), (2, False), (1, True), (2, True)])
async def test_800_streams_survive_50_killed_ranks(tp: int, warm_spare: bool) -> None:
    hit, pause = hits(signal.SIGKILL), 5.0 * warm_spare
    gaps = await disturbed(50, hit, tp, pause, tensor_parallel_size=tp, warm_spare=warm_spare)
    report(gaps, f"50 SIGKILLs at tp {tp}{' with warm_spare' if warm_spare else ''}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_streams_survive_20_pairs_of_kills_the_second_while_the_engine_recovers() -> None:
    # Each second kill meets ranks that have brought no step: by default the fifth within a minute ends the engine.
    gaps = await disturbed(20, hits(signal.SIGKILL, 1), 4, tensor_parallel_size=2, max_restarts=20)
    report(gaps, "20 pairs of SIGKILLs")


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_streams_survive_20_stopped_ranks() -> None:
    """With the default settings: noticed after five seconds, by the heartbeat after ten in the first steps."""
    gaps = await disturbed(20, hits(signal.SIGSTOP), 5, tensor_parallel_size=2)
    report(gaps, "20 SIGSTOPs")
