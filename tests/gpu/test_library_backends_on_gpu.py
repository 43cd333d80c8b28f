"""Attention by flash-attn, FlashInfer and torch's own kernels, where they are there: what their twins cannot show."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from configs.errors import ConfigError
from nanoengine import LLM, SamplingParams
from nanoengine.step import RowParams, SequenceState
from tests.workers.attention_batches import Sequences, random_chunks
from tests.workers.test_model_runner import Steps, make_config, tokens
from tests.workers.tiny_models import load_reference, make_tiny_checkpoint
from workers.attention import get_backend
from workers.attention.base import AttentionBackend
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]  # FlashInfer compiles at its first use

LIBRARIES = ("flash_attn", "flashinfer", "torch_varlen")
GREEDY_ROW = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
GREEDY = SamplingParams(temperature=0, max_tokens=24)
DEVICE = torch.device("cuda")


@pytest.fixture(params=LIBRARIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each backend whose library is there."""
    chosen: str = request.param
    try:
        get_backend(chosen, DEVICE)
    except ConfigError as error:
        pytest.skip(error.message)
    return chosen


def on_gpu(made: Sequences, backend: AttentionBackend) -> Sequences:
    made.backend, made.cache = backend, made.cache.to(DEVICE)
    made.q = [q.to(DEVICE) for q in made.q]
    return made


@pytest.mark.parametrize("seed", range(12))
def test_mixed_batches_equal_dense_attention(name: str, seed: int) -> None:
    """Decodes and chunks in any mixture, then decodes alone; slots that hold no token are NaN."""
    rng = random.Random(seed)
    backend = get_backend(name, DEVICE)
    num_kv_heads, group = rng.choice([(1, 1), (2, 1), (2, 2), (1, 7), (2, 4), (1, 20)])
    lengths = [rng.choice([1, 2, 255, 256, 257, rng.randint(1, 3000)]) for _ in range(rng.randint(1, 6))]
    head_dim, block_size = rng.choice([64, 128, 256]), 256 if name != "flashinfer" else rng.choice([16, 17, 64, 256])
    dtype = rng.choice([torch.float16, torch.bfloat16])
    backend.check(block_size, head_dim, dtype)
    made = on_gpu(Sequences.make(lengths, num_kv_heads, group, head_dim, block_size, dtype, seed, backend), backend)
    for chunks in (random_chunks(lengths, rng), [(seq, length - 1, length) for seq, length in enumerate(lengths)]):
        for each, out in zip(chunks, made.attend(chunks), strict=True):
            torch.testing.assert_close(out.cpu().double(), made.reference(*each), atol=2e-2, rtol=2e-2)


def test_logits_agree_with_transformers_eagerly_and_captured(name: str, tmp_path: Path) -> None:
    """A prompt in two chunks, then decodes, by launches and (where the backend can be captured) by graphs.

    In float16: on this model bfloat16 alone, in plain torch, is worth up to 2.7e-2 of the largest logit.
    """
    path = make_tiny_checkpoint(tmp_path, "qwen3", head_dim=64)
    ids = tokens(520)
    with torch.inference_mode():
        wanted = load_reference(path)(torch.tensor([ids])).logits[0]
    ends = (300, 510, *range(511, 521))
    for capture in (False, True):
        config = make_config(path, "float16", attention_backend=name, block_size=256, num_kv_blocks=150)
        runner = ModelRunner(config, DEVICE, SingleCommunicator())
        runner.load_model()
        runner.allocate(150)
        if capture:
            if not runner._spec().backend.capturable:
                continue
            runner.capture_graphs()
        steps = Steps(runner)
        for first, end in zip((0, *ends), ends, strict=False):
            fresh = ([7, 2, 5], GREEDY_ROW) if not first else ([], None)
            logits = steps.logits(SequenceState(0, ids[first:end], first, fresh[0], True, params=fresh[1]))
            assert logits is not None
            assert (logits[0].cpu() - wanted[end - 1]).abs().max() / wanted[end - 1].abs().max() < 1e-2


def test_served_answers(name: str) -> None:
    """In processes of its own, with overlap; several streams that start and end at different times."""
    settings = {"attention_backend": name, "block_size": 256, "num_kv_blocks": 64, "dtype": "bfloat16"}
    with LLM("demo", device="cuda", **settings) as llm:
        outputs = llm.generate(["中国的首都是", "What is 17 + 25? Answer:"] * 8, GREEDY, use_tqdm=False)
    for capital, total in zip(outputs[::2], outputs[1::2], strict=True):
        assert "北京" in capital.outputs[0].text
        assert "42" in total.outputs[0].text
