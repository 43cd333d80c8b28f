"""The host tier under a real model: the same tokens and the same bits with it, without it and with room for all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.checkpoint import load_checkpoint_config
from nanoengine import SamplingParams
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import SEEDS, make_prompt, model_directory
from tests.end_to_end.test_logits import Recorder

PARAMS = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
LENGTHS = (9, 16, 23, 5)
# All four want 160 tokens at their end; a quarter of that makes them give way to each other.
TIGHT: dict[str, Any] = {"num_kv_blocks": 14, "block_size": 4}
SWAP: dict[str, Any] = TIGHT | {"swap_space": 0.01, "preemption_mode": "swap"}


def prompts_of(name: str, model_dir: str) -> list[list[int]]:
    vocab_size = load_checkpoint_config(model_dir).vocab_size
    return [make_prompt(vocab_size, length, seed) for length, seed in zip(LENGTHS, SEEDS[name], strict=False)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["demo", "llama"])
def test_logits_have_the_same_bits_after_swapping_and_with_prefixes_from_the_host(
    name: str, dtype: str, root: Path
) -> None:
    model_dir = model_directory(name, root)
    prompts = prompts_of(name, model_dir)

    def run(**settings: Any) -> tuple[dict[tuple[int, int], torch.Tensor], list[list[int]], InProcessEngine]:
        engine = InProcessEngine(root, model=model_dir, dtype=dtype, **settings)
        with contextlib.closing(engine):
            recorder = Recorder(engine, len(prompts))
            outputs = engine.generate(prompts, PARAMS)
            # Again, so that prompts of the first run are hit in whichever tier they lie.
            assert engine.generate(prompts, PARAMS) == outputs
        return recorder.logits, outputs, engine

    expected, outputs, roomy = run()
    assert roomy.scheduler.num_preemptions == 0
    for settings in (
        SWAP,
        SWAP | {"async_scheduling": False, "max_num_batched_tokens": 7},
        SWAP | {"preemption_mode": "recompute"},
    ):
        found, same, engine = run(**settings)
        assert same == outputs
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, f"{settings}: other bits at (prompt, position) {different}"
        scheduler = engine.scheduler
        assert scheduler.num_preemptions > 0
        assert scheduler.num_swaps == (scheduler.num_preemptions if settings["preemption_mode"] == "swap" else 0)
        assert scheduler.blocks.num_host_hit_tokens > 0


def test_two_spawned_ranks_swap_alike(root: Path) -> None:
    prompts = prompts_of("demo", model_directory("demo", root))
    outputs = {}
    for executor, settings in {"inprocess": {}, "multiprocess": SWAP}.items():
        with contextlib.closing(InProcessEngine(root, tensor_parallel_size=2, executor=executor, **settings)) as engine:
            outputs[executor] = engine.generate(prompts, PARAMS)
            assert (engine.scheduler.num_swaps > 0) == (executor == "multiprocess")
    assert outputs["multiprocess"] == outputs["inprocess"]
