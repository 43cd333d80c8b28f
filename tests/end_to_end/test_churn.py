"""Many short requests with random aborts through the real processes, with the scheduler's books checked each step."""

from __future__ import annotations

import asyncio
import random

from nanoengine import AsyncLLM, SamplingParams

NUM_REQUESTS = 1000
CONCURRENCY = 64


async def test_a_thousand_requests_with_random_aborts_leave_every_block_free_or_cached() -> None:
    draw = random.Random(0)
    gate = asyncio.Semaphore(CONCURRENCY)
    ends: dict[str, int] = {}

    async def client(number: int, llm: AsyncLLM) -> None:
        prompt = [draw.randrange(16, 2000) for _ in range(draw.randrange(1, 24))]
        n = 3 if number % 8 == 0 else 1
        params = SamplingParams(temperature=0, n=n, max_tokens=draw.randrange(1, 12), ignore_eos=True)
        patience = draw.randrange(1, 8) if draw.random() < 0.4 else None
        aborts = draw.random() < 0.5
        async with gate:
            reason = "left"
            async for output in llm.generate(prompt, params, request_id=f"r{number}"):
                completion = output.outputs[0]
                if completion.finish_reason is not None:
                    reason = completion.finish_reason
                elif patience is not None and len(completion.token_ids) >= patience:
                    if not aborts:
                        break  # leaving the iterator aborts, too
                    await llm.abort(f"r{number}")
        ends[reason] = ends.get(reason, 0) + 1

    # A small cache, so that preemption takes part. With check_invariants a wrong count ends the engine, and with no
    # request open every block must be free or cached.
    async with AsyncLLM("demo", device="cpu", check_invariants=True, num_kv_blocks=48, max_num_seqs=32) as llm:
        await asyncio.gather(*(client(number, llm) for number in range(NUM_REQUESTS)))
        assert llm.num_unfinished == 0
        # Later than the last abort, so the idle engine has been checked when this is answered.
        async for output in llm.generate([20, 21, 22], SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)):
            last = output
        assert last.outputs[0].finish_reason == "length"
        assert llm.failure is None
    assert sum(ends.values()) == NUM_REQUESTS
    assert ends.get("error", 0) == 0
    assert ends["length"] > 500
    assert ends["abort"] > 50
    assert ends["left"] > 50
