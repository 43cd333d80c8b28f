"""Greedy token ids equal transformers' in float32, whatever the settings and however the engine is spread."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import (
    LENGTHS,
    LONG_LENGTH,
    MAX_NEW_TOKENS,
    MIN_GAP,
    MODELS,
    Reference,
    but_mostly_slow,
    make_reference,
)

GREEDY = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
UNLIMITED = 2**20
BUDGETS = (1, 7, 64, UNLIMITED)
# One short prompt and its output take at most 40 + 12 tokens; all six together want 181.
TIGHT_TOKENS = 64
# Of every feature one: q/k norm; rope scaling and K/V heads as they come; biases and a vocabulary of odd size.
VARIED = ("demo", "llama3", "qwen2")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


_references: dict[str, Reference] = {}


def reference(name: str, root: Path) -> Reference:
    """The short prompts of a model, and last its long one."""
    if name not in _references:
        _references[name] = make_reference(name, root)
    return _references[name]


@pytest.mark.parametrize("name", MODELS)
def test_prompts_are_far_from_ties(name: str, root: Path) -> None:
    ref = reference(name, root)
    assert min(ref.gaps) > MIN_GAP
    assert [len(prompt) for prompt in ref.prompts] == [*LENGTHS, LONG_LENGTH]


@pytest.mark.parametrize("name", but_mostly_slow(((name,) for name in MODELS), lambda name: name in VARIED))
def test_in_process_engine_equals_transformers_for_the_full_product_of_options(
    name: str, root: Path, tmp_path: Path
) -> None:
    ref = reference(name, root)
    prompts, outputs = ref.prompts[:-1], ref.outputs[:-1]
    for budget, block_size, caching, tight in itertools.product(BUDGETS, (4, 16), (True, False), (False, True)):
        settings: dict[str, Any] = {
            "max_num_batched_tokens": budget,
            "block_size": block_size,
            "enable_prefix_caching": caching,
            "num_kv_blocks": (TIGHT_TOKENS if tight else 1024) // block_size,
        }
        with contextlib.closing(InProcessEngine(tmp_path, model=ref.model_dir, dtype="float32", **settings)) as engine:
            assert engine.generate(prompts, GREEDY) == outputs, settings
            # Twice, so that the second run meets whatever the first left in the cache.
            assert engine.generate(prompts, GREEDY) == outputs, settings
            if tight and budget > 1:
                assert engine.scheduler.num_preemptions > 0, "the tight cache is meant to preempt"
            if caching and not tight and budget > 1:
                assert engine.scheduler.blocks.num_hit_tokens > 0


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("budget", [7, UNLIMITED])
def test_in_process_engine_gives_the_same_without_async_scheduling(
    budget: int, tight: bool, root: Path, tmp_path: Path
) -> None:
    ref = reference("demo", root)
    settings: dict[str, Any] = {"max_num_batched_tokens": budget, "async_scheduling": False}
    if tight:
        settings["num_kv_blocks"] = TIGHT_TOKENS // 16
    with contextlib.closing(InProcessEngine(tmp_path, model=ref.model_dir, dtype="float32", **settings)) as engine:
        assert engine.generate(ref.prompts[:-1], GREEDY) == ref.outputs[:-1]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [64, UNLIMITED])
def test_long_prompt_equals_transformers_in_chunks_and_at_once(
    name: str, budget: int, root: Path, tmp_path: Path
) -> None:
    ref = reference(name, root)
    with contextlib.closing(
        InProcessEngine(tmp_path, model=ref.model_dir, dtype="float32", max_num_batched_tokens=budget)
    ) as engine:
        assert engine.generate(ref.prompts, GREEDY) == ref.outputs


@pytest.mark.parametrize(
    ("name", "tp"),
    but_mostly_slow(itertools.product(MODELS, (1, 2, 4)), lambda name, tp: name == "demo" or tp == 2),
)
def test_spawned_ranks_equal_transformers(name: str, tp: int, root: Path) -> None:
    ref = reference(name, root)
    with LLM(ref.model_dir, tensor_parallel_size=tp, dtype="float32", device="cpu", skip_tokenizer_init=True) as llm:
        results = llm.generate(ref.prompts, GREEDY, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in results] == ref.outputs


@pytest.mark.parametrize(
    "settings",
    [
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7},
        {"max_num_batched_tokens": 64},
        {"block_size": 4},
        {"enable_prefix_caching": False},
        {"async_scheduling": False},
        {"num_kv_blocks": TIGHT_TOKENS // 16, "max_num_seqs": 3},
    ],
    ids=str,
)
def test_each_option_reaches_two_spawned_ranks(settings: dict[str, Any], root: Path) -> None:
    ref = reference("demo", root)
    with LLM("demo", tensor_parallel_size=2, dtype="float32", device="cpu", **settings) as llm:
        results = llm.generate(ref.prompts[:-1], GREEDY, use_tqdm=False)
    assert [result.outputs[0].token_ids for result in results] == ref.outputs[:-1]
