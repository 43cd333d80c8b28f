"""Logits of the whole engine: close to transformers', and of the same bits whatever batch, chunks and cache."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.checkpoint import load_checkpoint_config
from nanoengine import SamplingParams
from nanoengine.step import StepInput
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import (
    LENGTHS,
    LONG_LENGTH,
    MODELS,
    SEEDS,
    but_mostly_slow,
    load_twin,
    make_prompt,
    model_directory,
)

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
SETTINGS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 7, "block_size": 4},
    {"max_num_batched_tokens": 64, "num_kv_blocks": 4},
    {"enable_prefix_caching": False, "max_num_seqs": 2},
    {"max_num_batched_tokens": 64, "num_kv_blocks": 4, "async_scheduling": False},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


class Recorder:
    """Logits of each sampled token, by (prompt, position); the same key must always show the same bits."""

    def __init__(self, engine: InProcessEngine, num_prompts: int) -> None:
        self.logits: dict[tuple[int, int], torch.Tensor] = {}
        self._num_prompts = num_prompts
        runners = [rank.runner for rank in engine.executor._ranks]  # type: ignore[attr-defined]
        for each in runners:
            each.all_logits = True  # at tp 2 greedy rows would leave theirs on the ranks
        runner = runners[0]
        self._compute = runner.compute_logits
        runner.compute_logits = self.compute

    def compute(self, step: StepInput) -> Any:
        batch, logits = self._compute(step)
        sampled = [row for row in step.rows if row.sample]
        for i, row in enumerate(sampled):
            # The scheduler numbers sequences in the order in which the prompts were added.
            key = ((row.seq_id - 1) % self._num_prompts, row.num_computed_tokens + len(row.token_ids))
            if key in self.logits:
                assert torch.equal(logits[i], self.logits[key]), f"other bits at (prompt, position) {key}"
            self.logits[key] = logits[i].clone()
        return batch, logits


def record(root: Path, name: str, lengths: tuple[int, ...], **settings: Any) -> dict[tuple[int, int], torch.Tensor]:
    """Run the prompts twice (the second run meets the first one's cache) and return every sampled row's logits."""
    model_dir = model_directory(name, root)
    vocab_size = load_checkpoint_config(model_dir).vocab_size
    prompts = [make_prompt(vocab_size, length, seed) for length, seed in zip(lengths, SEEDS[name], strict=False)]
    with contextlib.closing(InProcessEngine(root, model=model_dir, **settings)) as engine:
        recorder = Recorder(engine, len(prompts))
        for _ in range(2):
            engine.generate(prompts, PARAMS)
    return recorder.logits


@pytest.mark.parametrize(
    ("name", "dtype", "tp"),
    but_mostly_slow(
        itertools.product(MODELS, ("float32", "bfloat16"), (1, 2)),
        lambda name, dtype, tp: (
            name == "demo" or (name, dtype, tp) in (("llama3", "float32", 1), ("qwen2", "bfloat16", 1))
        ),
    ),
)
def test_logits_have_the_same_bits_in_every_batch_chunk_and_cache_state(
    name: str, dtype: str, tp: int, root: Path
) -> None:
    common = {"dtype": dtype, "tensor_parallel_size": tp}
    expected = record(root, name, LENGTHS, **common)
    assert len(expected) == len(LENGTHS) * PARAMS.max_tokens  # type: ignore[operator]
    for settings in SETTINGS if tp == 1 else SETTINGS[2:3]:
        found = record(root, name, LENGTHS, **common, **settings)
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, f"{settings}: other bits at (prompt, position) {different}"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_within_1e_4_of_transformers_also_at_long_positions(name: str, root: Path) -> None:
    model_dir = model_directory(name, root)
    vocab_size = load_checkpoint_config(model_dir).vocab_size
    prompt = make_prompt(vocab_size, LONG_LENGTH, SEEDS[name][0])
    found = record(root, name, (LONG_LENGTH,), dtype="float32")[0, LONG_LENGTH]
    with torch.inference_mode():
        expected = load_twin(model_dir)(torch.tensor([prompt])).logits[0, -1]
    assert found.shape == (vocab_size,)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
