"""What only a GPU can show: compiled kernels in whole models, captured graphs, overlap, ranks on one device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from nanoengine import LLM, SamplingParams
from tests.workers.test_model_runner import Steps, chunk, make_config, tokens
from tests.workers.tiny_models import FAMILIES, load_reference, make_tiny_checkpoint
from workers import sampler
from workers.kv_cache import GIB
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator
from workers.sampler import SamplingRows

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
QUESTIONS = ["中国的首都是", "What is 17 + 25? Answer:", "Tell me a story about Lily the bear,"]


def greedy_ids(**settings: object) -> list[list[int]]:
    """What the demo model says in processes of its own."""
    with LLM("demo", device="cuda", num_kv_blocks=512, dtype="float32", **settings) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(QUESTIONS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_logits_equal_transformers_in_float32(family: str, backend: str, tmp_path: Path) -> None:
    """A prompt of 700 tokens in three chunks; 1e-3 of the largest logit, as products are summed in another order."""
    path = make_tiny_checkpoint(tmp_path, family)
    device, ids = torch.device("cuda"), tokens(700)
    runner = ModelRunner(make_config(path, attention_backend=backend), device, SingleCommunicator())
    runner.load_model()
    runner.allocate(150)
    steps = Steps(runner)
    told = [steps.logits(chunk(0, ids, first, end)) for first, end in ((0, 300), (300, 699), (699, 700))]
    with torch.inference_mode():
        wanted = load_reference(path)(torch.tensor([ids])).logits[0]
    for end, logits in zip((300, 699, 700), told, strict=True):
        assert logits is not None
        difference = (logits[0].cpu() - wanted[end - 1]).abs().max() / wanted[end - 1].abs().max()
        assert difference < 1e-3, f"{family} at {end}: {difference:.1e}"


def test_logits_agree_with_transformers_in_bfloat16(tmp_path: Path) -> None:
    """Within 2e-2 of the largest logit."""
    path = make_tiny_checkpoint(tmp_path, "qwen3")
    runner = ModelRunner(make_config(path, "bfloat16"), torch.device("cuda"), SingleCommunicator())
    runner.load_model()
    runner.allocate(150)
    ids = tokens(500)
    logits = Steps(runner).logits(chunk(0, ids, 0, 500))
    with torch.inference_mode():
        wanted = load_reference(path)(torch.tensor([ids])).logits[0, -1]
    assert logits is not None
    assert (logits[0].cpu() - wanted).abs().max() / wanted.abs().max() < 2e-2


def test_graphs_eager_steps_and_plain_torch_say_the_same() -> None:
    """Greedy ids of the demo model in float32, with overlap and without."""
    wanted = greedy_ids(attention_backend="torch", async_scheduling=False)
    assert greedy_ids(enforce_eager=True) == wanted
    assert greedy_ids() == wanted
    assert greedy_ids(async_scheduling=False) == wanted


def test_two_ranks_on_one_gpu_say_the_same() -> None:
    """Their sums meet on the host; no graph holds them."""
    wanted = greedy_ids(enforce_eager=True)
    assert greedy_ids(tensor_parallel_size=2, share_gpus=True, gpu_memory_utilization=0.5) == wanted


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_say_the_same() -> None:
    """Over NCCL, in captured graphs and without."""
    wanted = greedy_ids(enforce_eager=True)
    assert greedy_ids(tensor_parallel_size=2) == wanted
    assert greedy_ids(tensor_parallel_size=2, enforce_eager=True) == wanted


def test_sampling_kernel_chooses_what_the_sorting_twin_does() -> None:
    """The vocabulary of Qwen3, 256 rows of all kinds; of 1e5 draws, one may differ by the last bit of an exp."""
    rng = np.random.default_rng(0)
    number = 256
    logits = torch.randn(number, 151_936, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) * 3
    rows = SamplingRows(
        temperature=rng.choice([0.0, 0.6, 1.0], number),
        top_k=rng.choice([0, 20, 50], number),
        top_p=rng.choice([1.0, 0.95, 0.5], number),
        min_p=rng.choice([0.0, 0.05], number),
        seed=rng.integers(0, 2**63, number, dtype=np.uint64),
        index=np.zeros(number, np.uint64),
        position=np.arange(number, dtype=np.uint64),
    )
    by_kernel = sampler.launch_sample(logits, rows, use_kernel=True)
    assert int((by_kernel != sampler.launch_sample(logits, rows)).sum()) <= 1


def test_memory_of_the_cache_is_what_is_free(tmp_path: Path) -> None:
    """By default the blocks fill the share of the device that may be used, and no more."""
    path = make_tiny_checkpoint(tmp_path, "qwen3")
    config = make_config(path, num_kv_blocks=None, gpu_memory_utilization=0.5, max_num_seqs=65_536)
    runner = ModelRunner(config, torch.device("cuda"), SingleCommunicator())
    runner.load_model()
    number = runner.max_kv_blocks()
    runner.allocate(number)
    free, total = torch.cuda.mem_get_info()
    assert total - free <= 0.5 * total + GIB
