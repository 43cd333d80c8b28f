"""The sampling fields through the whole engine but its processes: against transformers, and whatever the schedule."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.registry import load_model_path
from nanoengine.messages import AddRequest
from nanoengine.sampling_params import SamplingParams
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import make_prompt

VOCAB = 2048
# In an order, and of lengths, that make a tight cache preempt.
PROMPTS = [make_prompt(VOCAB, length, length) for length in (31, 16, 40, 4, 17)]
PROMPTS += [PROMPTS[0][:24] + make_prompt(VOCAB, 5, 1)]
TIGHT = {"num_kv_blocks": 13, "block_size": 4}
SCHEDULES: list[dict[str, Any]] = [
    {}, {"max_num_batched_tokens": 7}, TIGHT, TIGHT | {"enable_prefix_caching": False}, {"tensor_parallel_size": 2},
]  # fmt: skip
EVERYTHING = {
    "presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "logit_bias": {77: 3.0, 5: -100},
    "bad_words_token_ids": [[77, 77], [9]], "min_tokens": 6, "ignore_eos": False,
}  # fmt: skip


@contextlib.contextmanager
def engine_with(run_dir: Path, **settings: Any) -> Iterator[InProcessEngine]:
    with contextlib.closing(InProcessEngine(run_dir, model="demo", dtype="float32", **settings)) as engine:
        yield engine


@pytest.fixture(scope="module")
def twin() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(load_model_path("demo"), dtype=torch.float32).eval()


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.4}, {"repetition_penalty": 1.4}),
        ({"bad_words_token_ids": [[300], [301, 302]]}, {"bad_words_ids": [[300], [301, 302]]}),
        ({}, {}),
    ],
    ids=["repetition_penalty", "bad_words", "min_tokens alone"],
)
def test_greedy_output_equals_transformers(
    ours: dict[str, Any], theirs: dict[str, Any], settings: dict[str, Any], twin: Any, tmp_path: Path
) -> None:
    """A penalty that only saw what follows a prefix hit, or lost its counts in a preemption, would differ."""
    expected = []
    for prompt in PROMPTS:
        ids = twin.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False, max_new_tokens=12, min_new_tokens=10, pad_token_id=0, **theirs,
        )  # fmt: skip
        expected.append(ids[0, len(prompt) :].tolist())
    with engine_with(tmp_path, **settings) as engine:
        params = SamplingParams(temperature=0, max_tokens=12, min_tokens=10, **ours)
        assert engine.generate(PROMPTS, params) == expected
        assert engine.generate(PROMPTS, params) == expected, "the second time, with prefix hits"
        if settings is TIGHT:
            assert engine.scheduler.num_preemptions > 0
        if not settings:
            assert engine.scheduler.blocks.num_hit_tokens > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_seed_gives_the_same_tokens_whatever_the_schedule(temperature: float, tmp_path: Path) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=12, **EVERYTHING)
    plain = SamplingParams(temperature=temperature, max_tokens=12)
    seeds = list(range(len(PROMPTS)))
    with engine_with(tmp_path) as engine:
        alone = [engine.generate([prompt], params, [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)]
        assert alone != engine.generate(PROMPTS, plain, seeds)
    for settings in SCHEDULES[:4]:
        with engine_with(tmp_path, **settings) as engine:
            assert engine.generate(PROMPTS, params, seeds) == alone, settings
            assert engine.generate(PROMPTS, params, seeds) == alone, settings


def test_masks_and_bias_decide_what_comes(tmp_path: Path) -> None:
    with engine_with(tmp_path) as engine:
        only = SamplingParams(temperature=1.0, max_tokens=8, allowed_token_ids=[50, 60], ignore_eos=True)
        assert {token for ids in engine.generate(PROMPTS, only) for token in ids} <= {50, 60}
        pushed = SamplingParams(temperature=0, max_tokens=4, logit_bias={321: 100})
        assert engine.generate(PROMPTS, pushed) == [[321] * 4] * len(PROMPTS)
        bias = {321: 90, 5: 50}
        no_twice = SamplingParams(temperature=0, max_tokens=8, logit_bias=bias, bad_words_token_ids=[[321, 321]])
        assert engine.generate(PROMPTS[:1], no_twice) == [[321, 5] * 4]
        varied = SamplingParams(temperature=0, max_tokens=40, presence_penalty=2, frequency_penalty=2)
        for ids in engine.generate(PROMPTS, varied):
            assert len(set(ids)) > len(ids) // 2


@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_logprobs_are_those_of_the_raw_logits(settings: dict[str, Any], twin: Any, tmp_path: Path) -> None:
    """Within rounding of transformers' log-softmax, whatever penalties do to the draw, preempted or not."""
    params = SamplingParams(temperature=1.0, max_tokens=10, min_tokens=10, logprobs=3, presence_penalty=1.0)
    with engine_with(tmp_path, **settings) as engine:
        answers = engine.generate_deltas(PROMPTS, params, list(range(len(PROMPTS))))
        if settings is TIGHT:
            assert engine.scheduler.num_preemptions > 0
    for prompt, deltas in zip(PROMPTS, answers, strict=True):
        output = [token for delta in deltas for token in delta.token_ids]
        told = [entry for delta in deltas for entry in delta.logprobs or []]
        assert len(told) == len(output) == 10
        with torch.inference_mode():
            logits = twin(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)
        for (ids, values, rank), token, row in zip(told, output, expected, strict=True):
            assert ids[0] == token
            assert len(ids) == 4
            assert values == pytest.approx(row[ids].tolist(), abs=1e-4)
            assert values[1:] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
            assert rank == (row > row[token] + 1e-4).sum() + 1


def test_a_replay_brings_the_logprobs_again(tmp_path: Path) -> None:
    """They are kept with the tokens: a front end that missed a message must not go without."""
    params = SamplingParams(temperature=0, max_tokens=6, min_tokens=6, logprobs=1)
    with engine_with(tmp_path) as engine:
        message = AddRequest("c", "r", PROMPTS[0], params.to_dict(), 0, 0.0, 0, [[]])
        engine.scheduler.add(message)
        for _ in range(4):
            engine.step()
        first = [entry for item in engine.scheduler.take_deltas() for entry in item.delta.logprobs or []]
        engine.scheduler.add(dataclasses.replace(message, journal=[[0]]))
        (again,) = engine.scheduler.take_deltas()
        assert again.delta.start == 1
        assert again.delta.logprobs == first[1:]
