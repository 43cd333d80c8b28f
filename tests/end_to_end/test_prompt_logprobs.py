"""Log-probabilities of prompts by the whole engine: transformers' values, of the same bits whatever the schedule."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.checkpoint import load_checkpoint_config
from nanoengine import LLM
from nanoengine.prompt_log import PromptLog
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import PromptLogprobs
from tests.end_to_end.inprocess import InProcessEngine
from tests.end_to_end.reference import LENGTHS, load_twin, make_prompt, model_directory
from workers import prompt_logprobs

NUMBER = 3
TIGHT = {"num_kv_blocks": 13, "block_size": 4, "max_num_batched_tokens": 7}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 7, "block_size": 4, "async_scheduling": False},
    TIGHT,
    TIGHT | {"enable_prefix_caching": False, "async_scheduling": False},
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def prompts_of(name: str, root: Path) -> list[list[int]]:
    vocab_size = load_checkpoint_config(model_directory(name, root)).vocab_size
    return [make_prompt(vocab_size, length, length) for length in LENGTHS]


def tell(
    name: str, root: Path, prompts: list[list[int]], warm: bool = True, **settings: Any
) -> tuple[list[list[int]], list[PromptLogprobs | None]]:
    """Outputs, and what was told of each prompt; with `warm` the same prompts, and plain ones, ran before."""
    model_dir = model_directory(name, root)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=NUMBER)
    settings = {"model": model_dir, "dtype": "float32", "skip_tokenizer_init": name != "demo"} | settings
    with contextlib.closing(InProcessEngine(root, **settings)) as engine:
        if warm:
            engine.generate(prompts, SamplingParams(temperature=0, max_tokens=2))
        answers = engine.generate_deltas(prompts, params)
        assert not warm or not engine.config.cache.enable_prefix_caching or engine.scheduler.blocks.num_cached_blocks
        if "num_kv_blocks" in settings:
            assert engine.scheduler.num_preemptions > 0
    told: list[PromptLogprobs | None] = []
    for prompt, deltas in zip(prompts, answers, strict=True):
        log = PromptLog(0, len(prompt) - 1)
        for delta in deltas:
            if delta.prompt_logprobs is not None:
                assert delta.prompt_logprobs.start == log.end, "an entry was told twice or left out"
                log.add(delta.prompt_logprobs)
            assert log.is_complete or not delta.token_ids
        told.append(log.since(0))
    return [[token for delta in deltas for token in delta.token_ids] for deltas in answers], told


@pytest.mark.parametrize("name", ["demo", "qwen3"])
def test_values_are_transformers_and_bits_are_the_same_whatever_the_schedule(name: str, root: Path) -> None:
    prompts, twin = prompts_of(name, root), load_twin(model_directory(name, root))
    outputs, told = tell(name, root, prompts, warm=False)
    for prompt, chunk in zip(prompts, told, strict=True):
        if chunk is None:
            assert len(prompt) == 1
            continue
        with torch.inference_mode():
            expected = twin(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        entries = list(chunk.entries())
        for (ids, values, rank), token, row in zip(entries, prompt[1:], expected, strict=True):
            assert ids[0] == token
            assert len(ids) == 1 + NUMBER
            assert values == pytest.approx(row[ids].tolist(), abs=1e-4)
            assert values[1:] == pytest.approx(row.topk(NUMBER).values.tolist(), abs=1e-4)
            assert abs(rank - 1 - (row > row[token]).sum()) <= (abs(row - row[token]) < 1e-4).sum() - 1
    for settings in SETTINGS if name == "demo" else SETTINGS[-2:]:
        assert tell(name, root, prompts, **settings) == (outputs, told), settings


def test_ranks_that_cut_slices_together_tell_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of("qwen3", root)
    _, alone = tell("qwen3", root, prompts)
    monkeypatch.setattr(prompt_logprobs, "SLICE_BYTES", 4 * 263 * 5)  # five positions at a time
    assert tell("qwen3", root, prompts)[1] == alone, "other slices, other bits"
    _, together = tell("qwen3", root, prompts, tensor_parallel_size=2)
    assert tell("qwen3", root, prompts, tensor_parallel_size=2, max_num_batched_tokens=7)[1] == together
    for one, other in zip(alone, together, strict=True):
        ours, theirs = (list(each.entries()) if each else [] for each in (one, other))
        assert [ids[0] for ids, _, _ in ours] == [ids[0] for ids, _, _ in theirs]
        for (_, values, _), (_, others, _) in zip(ours, theirs, strict=True):
            assert values == pytest.approx(others, abs=1e-4)


def test_through_real_processes_with_two_ranks(root: Path) -> None:
    prompts = prompts_of("demo", root)[:4]
    twin = load_twin(model_directory("demo", root))
    settings: dict[str, Any] = {"dtype": "float32", "tensor_parallel_size": 2, "max_num_batched_tokens": 16}
    with LLM("demo", num_kv_blocks=64, max_model_len=128, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0)
        llm.generate(prompts, SamplingParams(max_tokens=1), use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.generate(prompts[0], SamplingParams(max_tokens=1), use_tqdm=False)[0].prompt_logprobs is None
    for prompt, output in zip(prompts, outputs, strict=True):
        told = output.prompt_logprobs
        assert told is not None
        assert told[0] is None
        assert [list(entry or ()) for entry in told[1:]] == [[token] for token in prompt[1:]]
        with torch.inference_mode():
            expected = twin(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        values = [entry[token].logprob for entry, token in zip(told[1:], prompt[1:], strict=True) if entry]
        assert values == pytest.approx([row[t].item() for row, t in zip(expected, prompt[1:], strict=True)], abs=1e-4)
