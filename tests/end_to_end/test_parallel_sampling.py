"""Several outputs of one prompt through the whole engine: against transformers, and each as if it were alone."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.outputs import RequestOutput
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import MAX_NEW_TOKENS, Reference, make_prompt, make_reference

VOCAB = 2048
LENGTHS = (1, 16, 17, 18, 41)  # one token, and a whole block before the last token, at it and behind it
PROMPTS = [make_prompt(VOCAB, length, length) for length in LENGTHS]
TIGHT = {"num_kv_blocks": 14, "block_size": 4}
SCHEDULES: list[dict[str, Any]] = [
    {},
    {"async_scheduling": False, "enable_prefix_caching": False},
    {"max_num_batched_tokens": 7, "enable_prefix_caching": False, "max_num_seqs": 3},
    TIGHT,
    TIGHT | {"enable_prefix_caching": False, "async_scheduling": False},
]
SAMPLED = SamplingParams(
    temperature=3.0, n=5, max_tokens=10, ignore_eos=True, repetition_penalty=1.1, presence_penalty=0.2
)


@contextlib.contextmanager
def engine_with(run_dir: Path, **settings: Any) -> Iterator[InProcessEngine]:
    with contextlib.closing(InProcessEngine(run_dir, model="demo", dtype="float32", **settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference("demo", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("settings", [SCHEDULES[0], SCHEDULES[3], {"tensor_parallel_size": 2}], ids=str)
def test_each_greedy_output_equals_transformers(settings: dict[str, Any], reference: Reference, tmp_path: Path) -> None:
    params = SamplingParams(temperature=0, n=4, max_tokens=MAX_NEW_TOKENS)
    with engine_with(tmp_path, **settings) as engine:
        outputs = engine.generate_all(reference.prompts[:-1], params)
        assert outputs == [[tokens] * 4 for tokens in reference.outputs[:-1]]
        if settings is TIGHT:
            assert engine.scheduler.num_preemptions > 0


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[int]]]:
    """Each sample computed from its prompt on, in a step of its own: one row, one request, nothing shared."""
    settings = {"max_num_seqs": 1, "enable_prefix_caching": False}
    with engine_with(tmp_path_factory.mktemp("alone"), **settings) as engine:
        return [engine.generate_all([prompt], SAMPLED, [seed])[0] for seed, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_samples_are_those_that_each_sequence_draws_alone(
    settings: dict[str, Any], alone: list[list[list[int]]], tmp_path: Path
) -> None:
    seeds = list(range(len(PROMPTS)))
    with engine_with(tmp_path, **settings) as engine:
        assert engine.generate_all(PROMPTS, SAMPLED, seeds) == alone
        assert engine.generate_all(PROMPTS, SAMPLED, seeds) == alone, "the second time, with prefix hits"


def test_a_sample_is_the_same_whatever_the_number_of_samples(alone: list[list[list[int]]], tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        for n in (1, 2, 3):
            params = SamplingParams(**{**SAMPLED.to_dict(), "n": n})
            assert engine.generate_all(PROMPTS, params, list(range(5))) == [samples[:n] for samples in alone]
    for samples in alone:
        assert len({tuple(sample) for sample in samples}) == 5
        assert len({sample[0] for sample in samples}) > 1, "first tokens are drawn independently"


def cumulative(output: RequestOutput) -> list[float]:
    return [each.cumulative_logprob or 0.0 for each in output.outputs]


def test_best_of_through_processes_ranks_what_n_would_show() -> None:
    """At tp 2, so that copies and forked rows reach every rank."""
    with LLM("demo", device="cpu", tensor_parallel_size=2, check_invariants=True) as llm:
        common: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 12, "ignore_eos": True}
        prompt = "Tell me a story about Lily the bear"
        [every] = llm.generate([prompt], SamplingParams(n=8, logprobs=1, **common), use_tqdm=False)
        assert [each.index for each in every.outputs] == list(range(8))
        for each in every.outputs:
            assert each.logprobs is not None
            chosen = [entry[token].logprob for entry, token in zip(each.logprobs, each.token_ids, strict=True)]
            assert each.cumulative_logprob == math.fsum(chosen)
        ranked = sorted(every.outputs, key=lambda each: -(each.cumulative_logprob or 0.0))

        [best] = llm.generate([prompt], SamplingParams(n=3, best_of=8, **common), use_tqdm=False)
        assert [each.token_ids for each in best.outputs] == [each.token_ids for each in ranked[:3]]
        assert [each.index for each in best.outputs] == [0, 1, 2]
        assert {(each.logprobs, each.cumulative_logprob) for each in best.outputs} == {(None, None)}
        assert best.metrics.num_completion_tokens == 8 * 12

        [told] = llm.generate([prompt], SamplingParams(n=3, best_of=8, logprobs=0, **common), use_tqdm=False)
        assert cumulative(told) == sorted(cumulative(every), reverse=True)[:3]
        several = llm.generate([prompt, prompt], SamplingParams(n=2, temperature=0, max_tokens=4), use_tqdm=False)
        assert len({tuple(each.token_ids) for output in several for each in output.outputs}) == 1
