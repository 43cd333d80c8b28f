"""What transformers generates greedily, and prompts whose answers no rounding can change.

A greedy answer is only a fair yardstick where the two best logits are well apart at every step, so prompts are
drawn from committed seeds that were chosen for that, and the gap is asserted whenever they are used.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from configs.checkpoint import load_checkpoint_config
from configs.registry import load_model_path
from tests.workers.tiny_models import FAMILIES, make_tiny_checkpoint

MODELS = ("demo", *FAMILIES)
MAX_NEW_TOKENS = 12
MIN_GAP = 1e-3  # of the largest logit

LENGTHS = (31, 16, 40, 4, 17, 1)  # in an order that makes a tight cache preempt
LONG_LENGTH = 1500
# For each model the seeds of its prompts, one a length, the long one last; chosen so that no two logits nearly tie,
# which test_prompts_are_far_from_ties asserts.
SEEDS: dict[str, tuple[int, ...]] = {
    "demo": (3, 8, 17, 15, 17, 10, 79),
    "llama": (0, 1, 0, 0, 0, 0, 0),
    "llama3": (0, 0, 1, 0, 0, 0, 0),
    "mistral": (0, 0, 1, 0, 0, 0, 0),
    "qwen2": (1, 0, 0, 0, 1, 0, 0),
    "qwen3": (0, 0, 0, 0, 0, 0, 0),
}


def but_mostly_slow(cases: Iterable[tuple[Any, ...]], quick: Callable[..., bool]) -> list[Any]:
    """Parameters for a test: those cases that are not `quick` run with --slow only."""
    return [pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow) for case in cases]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A model, prompts for it and transformers' greedy continuations of them."""

    model_dir: str
    prompts: list[list[int]]
    outputs: list[list[int]]
    gaps: list[float]


def model_directory(name: str, root: Path) -> str:
    """The demo model's directory, or that of a tiny random checkpoint, written under `root` once."""
    if name == "demo":
        return load_model_path("demo")
    path = root / name
    if not path.exists():
        make_tiny_checkpoint(path, name)
    return str(path)


def make_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """`length` random token ids; the last quarter of the vocabulary's low end is left to special tokens."""
    draw = random.Random(f"{length}/{seed}")
    return [draw.randrange(min(16, vocab_size // 4), vocab_size) for _ in range(length)]


def greedy(model: torch.nn.Module, prompt: list[int], eos: tuple[int, ...]) -> tuple[list[int], float]:
    """transformers' greedy continuation in float32, and the smallest gap between the two best logits on the way."""
    with torch.inference_mode():
        result = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    logits = torch.cat(result.logits)  # (steps, vocab_size)
    best = logits.topk(2).values
    gap = ((best[:, 0] - best[:, 1]) / logits.abs().amax(1)).min().item()
    return result.sequences[0, len(prompt) :].tolist(), gap


def load_twin(model_dir: str) -> torch.nn.Module:
    """transformers' model of a checkpoint, in float32."""
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def make_reference(name: str, root: Path) -> Reference:
    """Run transformers over the model's prompts: the short ones, and last the long one."""
    model_dir = model_directory(name, root)
    checkpoint = load_checkpoint_config(model_dir)
    twin = load_twin(model_dir)
    prompts = [
        make_prompt(checkpoint.vocab_size, length, seed)
        for length, seed in zip((*LENGTHS, LONG_LENGTH), SEEDS[name], strict=True)
    ]
    answers = [greedy(twin, prompt, checkpoint.eos_token_ids) for prompt in prompts]
    return Reference(model_dir, prompts, [ids for ids, _ in answers], [gap for _, gap in answers])
