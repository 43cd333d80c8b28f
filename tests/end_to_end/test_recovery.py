"""Ranks are killed and stopped under 16 streams of every kind: each one equals the undisturbed run byte for byte."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psutil
import pytest

from nanoengine import AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from nanoengine.structured_outputs import StructuredOutputsParams

NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 12, "maxItems": 20}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 40}, "numbers": NUMBERS},
    "required": ["name", "numbers"],
}
STORY = "Tell me a story about Lily the bear, the garden and the flute."


def load(length: int) -> list[tuple[str, SamplingParams | BeamSearchParams]]:
    """16 requests: greedy and seeded sampling, penalties, log-probabilities, n, JSON schemas and a beam search."""

    def params(**given: Any) -> SamplingParams:
        return SamplingParams(**({"max_tokens": length, "ignore_eos": True} | given))

    kinds = [
        params(temperature=0),
        params(temperature=0.9, seed=11),
        params(temperature=0, repetition_penalty=1.2, presence_penalty=0.4, frequency_penalty=0.3),
        params(temperature=0.8, seed=12, top_p=0.9, top_k=40, logprobs=3),
        params(temperature=1.0, seed=13, n=2, max_tokens=length // 2),
        params(temperature=0, prompt_logprobs=2, logprobs=0),
        params(temperature=1.0, seed=14, structured_outputs=StructuredOutputsParams(json=SCHEMA), ignore_eos=False),
        params(temperature=0.7, seed=15, min_p=0.05, frequency_penalty=0.5, stop=["zzzz"]),
    ]
    prompts = [f"{STORY} Part {number}." if number % 2 else "中国的首都是" for number in range(16)]
    search = BeamSearchParams(beam_width=3, max_tokens=length // 2)
    return [*zip(prompts, kinds + kinds[:-1], strict=False), (prompts[-1], search)]


def told(output: RequestOutput) -> list[Any]:
    """All that a client may see of an answer."""
    outputs = [(o.index, o.text, list(o.token_ids), o.finish_reason, o.logprobs, o.error) for o in output.outputs]
    return [output.prompt_token_ids, output.prompt_logprobs, output.finished, outputs]


class Gaps:
    """The largest pause between two outputs of each stream, in seconds, and how many tokens were read in all."""

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.num_tokens = 0

    async def read(self, llm: AsyncLLM, prompt: str, params: SamplingParams | BeamSearchParams) -> list[Any]:
        before: list[list[int]] = []
        largest, last_time = 0.0, None
        searching = isinstance(params, BeamSearchParams)
        async for output in llm.beam_search(prompt, params) if searching else llm.generate(prompt, params):
            now = time.monotonic()
            largest, last_time = max(largest, now - (last_time or now)), now
            ids = [list(each.token_ids) for each in output.outputs]
            self.num_tokens += sum(map(len, ids)) - sum(map(len, before))
            for earlier, later in zip(before, ids, strict=False):
                assert later[: len(earlier)] == earlier, "a stream took back a token"
            before = ids
        self.largest.append(largest)
        return told(output)


def ranks_of(llm: AsyncLLM) -> list[int]:
    """Process ids of the ranks, in their order; those of a spare group are not among them."""
    scheduler = psutil.Process(llm._engine.pid)
    found = [(child.name(), child.pid) for child in scheduler.children(recursive=True)]
    return [pid for name, pid in sorted(found) if name.startswith("nano-worker")]


Disturbance = Callable[[AsyncLLM, float], Coroutine[None, None, None]]


async def run(llm: AsyncLLM, length: int, gaps: Gaps, disturb: Coroutine[None, None, None] | None) -> list[list[Any]]:
    tasks = [asyncio.create_task(gaps.read(llm, *each)) for each in load(length)]
    if disturb is not None:
        await disturb
    return list(await asyncio.gather(*tasks))


def hits(number: signal.Signals, dice: random.Random, further: int = 0) -> Disturbance:
    """Send a signal to a random rank at a random moment; `further` ones follow within the next recovery."""

    async def hit(llm: AsyncLLM, seconds: float) -> None:
        await asyncio.sleep(dice.uniform(0, seconds))
        for times in range(1 + further):
            await asyncio.sleep(dice.uniform(0, 1.5) if times else 0)
            ranks = ranks_of(llm)
            if ranks:
                os.kill(dice.choice(ranks), number)

    return hit


async def disturbed(rounds: int, disturb: Disturbance, length: int = 80, pause: float = 0, **settings: Any) -> Gaps:
    """So many rounds of the 16 requests, disturbed each, compared with a round that was left in peace.

    Before each disturbed one `pause` seconds pass, in which spare ranks import what they need.
    """
    gaps = Gaps()
    async with AsyncLLM("demo", device="cpu", **settings) as llm:
        begin = time.monotonic()
        expected = await run(llm, length, Gaps(), None)
        seconds = time.monotonic() - begin
        for _ in range(rounds):
            await asyncio.sleep(pause)
            assert await run(llm, length, gaps, disturb(llm, 0.8 * seconds)) == expected
            async with asyncio.timeout(60):
                await llm.generate("a", SamplingParams(max_tokens=1)).__anext__()  # whatever it still recovers from
        assert llm.facts is not None
        assert llm.facts.group > rounds
        assert llm.failure is None
    return gaps


def report(gaps: Gaps, what: str) -> None:
    ordered = sorted(gaps.largest)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    print(
        f"\n{what}: {len(ordered)} of {len(ordered)} streams equal; largest gap of a stream: median "
        f"{statistics.median(ordered):.2f} s, p99 {p99:.2f} s, largest {ordered[-1]:.2f} s"
    )


@pytest.mark.parametrize(("tp", "further", "warm_spare"), [(1, 0, True), (2, 1, False)])
async def test_streams_survive_killed_ranks(tp: int, further: int, warm_spare: bool) -> None:
    """`further` kills come while the engine recovers, or just after."""
    disturb = hits(signal.SIGKILL, random.Random(tp + further), further)
    await disturbed(1, disturb, tensor_parallel_size=tp, warm_spare=warm_spare)


async def test_streams_survive_a_stopped_rank_and_the_log_names_it(capfd: pytest.CaptureFixture[str]) -> None:
    dice = random.Random(3)
    await disturbed(1, hits(signal.SIGSTOP, dice), tensor_parallel_size=2, step_timeout=1.5)
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
    disturb = hits(signal.SIGKILL, random.Random(tp))
    gaps = await disturbed(50, disturb, pause=5.0 * warm_spare, tensor_parallel_size=tp, warm_spare=warm_spare)
    report(gaps, f"50 SIGKILLs at tp {tp}{' with warm_spare' if warm_spare else ''}")


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_streams_survive_20_pairs_of_kills_the_second_while_the_engine_recovers() -> None:
    gaps = await disturbed(20, hits(signal.SIGKILL, random.Random(4), 1), tensor_parallel_size=2)
    report(gaps, "20 pairs of SIGKILLs")


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_streams_survive_20_stopped_ranks() -> None:
    """With the default settings: noticed after five seconds, by the heartbeat after ten in the first steps."""
    gaps = await disturbed(20, hits(signal.SIGSTOP, random.Random(5)), tensor_parallel_size=2)
    report(gaps, "20 SIGSTOPs")
