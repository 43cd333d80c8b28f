"""Streams of every kind, and rounds of them that are disturbed; each must equal the undisturbed one byte for byte."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psutil

from nanoengine import AsyncLLM, BeamSearchParams, RequestOutput, SamplingParams
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.waiting import until_async

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
    """The largest pause between two outputs of each stream, in seconds, and how many tokens were read in all.

    `num_open` is how many streams each disturbance met.
    """

    def __init__(self) -> None:
        self.largest: list[float] = []
        self.num_tokens = 0
        self.num_open: list[int] = []

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


Hit = Callable[[AsyncLLM, random.Random], Coroutine[None, None, None]]


async def run(llm: AsyncLLM, length: int, gaps: Gaps, disturb: Coroutine[None, None, None] | None) -> list[list[Any]]:
    tasks = [asyncio.create_task(gaps.read(llm, *each)) for each in load(length)]
    if disturb is not None:
        await disturb
    return list(await asyncio.gather(*tasks))


async def rounds(llm: AsyncLLM, hits: list[Hit], dice: random.Random, length: int = 80, pause: float = 0) -> Gaps:
    """A round of the 16 requests for each of `hits`, which comes at a random token of it, and one in peace before.

    Each round is over when what was hit has been replaced. Before it `pause` seconds pass, in which spare ranks import
    what they need.
    """
    undisturbed, gaps = Gaps(), Gaps()
    expected = await run(llm, length, undisturbed, None)

    async def disturb(hit: Hit) -> None:
        wanted = gaps.num_tokens + dice.uniform(0, 0.9) * undisturbed.num_tokens
        await until_async(lambda: gaps.num_tokens >= wanted)
        gaps.num_open.append(llm.num_unfinished)
        await hit(llm, dice)

    for hit in hits:
        await asyncio.sleep(pause)
        before = generation(llm)
        for number, found in enumerate(await run(llm, length, gaps, disturb(hit))):
            assert found == expected[number], f"stream {number}: {found} is not {expected[number]}"
        await until_async(lambda before=before: llm.is_ready and generation(llm) > before)  # type: ignore[misc]
        answer = [output async for output in llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))][-1]
        assert len(answer.outputs[0].token_ids) == 3
    assert llm.failure is None
    assert min(gaps.num_open) > 0
    return gaps


def generation(llm: AsyncLLM) -> tuple[int, int]:
    """Schedulers so far, and groups of ranks of the present one."""
    assert llm.facts is not None
    return llm.restart_stats.restarts.total(), llm.facts.group


def report(gaps: Gaps, what: str) -> None:
    """Print the figures of a long trial."""
    ordered = sorted(gaps.largest)
    p99 = ordered[int(0.99 * (len(ordered) - 1))]
    print(
        f"\n{what}: {len(ordered)} of {len(ordered)} streams equal, {sum(gaps.num_open)} of them open when it came; "
        f"largest gap of a stream: median {statistics.median(ordered):.2f} s, p99 {p99:.2f} s, "
        f"largest {ordered[-1]:.2f} s; of the slowest of each round: median {median_of_rounds(gaps):.2f} s"
    )


def median_of_rounds(gaps: Gaps, size: int = 16) -> float:
    """Over rounds of `size` streams, of the largest gap in each."""
    return statistics.median(max(gaps.largest[at : at + size]) for at in range(0, len(gaps.largest), size))
