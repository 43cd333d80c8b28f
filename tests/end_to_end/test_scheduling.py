"""What a request may say about its scheduling, through the real client, scheduler and model."""

from __future__ import annotations

from nanoengine import LLM, SamplingParams

PROMPT = list(range(20, 84))
# 4,000 steps of 16 rows: many times what the deadline leaves them, on whatever machine.
LONG = SamplingParams(temperature=1, n=16, max_tokens=4000, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


def test_salts_resets_deadlines_priorities_and_metrics_through_a_whole_engine() -> None:
    with LLM("demo", device="cpu", executor="inprocess", policy="priority", check_invariants=True) as llm:

        def cached(salt: str | None = None) -> int:
            [output] = llm.generate([{"prompt_token_ids": PROMPT, "cache_salt": salt}], SHORT, use_tqdm=False)
            assert output.metrics.ttft is not None
            assert output.metrics.tpot is not None
            return output.metrics.num_cached_tokens

        assert [cached(), cached(), cached("tenant"), cached("tenant")] == [0, 48, 0, 48]
        llm.reset_prefix_cache()
        assert cached() == 0

        [late] = llm.generate([PROMPT], LONG, use_tqdm=False, timeout=2)
        assert late.outputs[0].error_kind == "RequestTimeoutError"
        assert 0 < len(late.outputs[0].token_ids) < 4000
        fine = llm.generate([PROMPT, PROMPT[:9]], SHORT, use_tqdm=False, timeout=100, priority=[1, 0])
        assert [each.outputs[0].finish_reason for each in fine] == ["length", "length"]
