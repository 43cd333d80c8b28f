"""A whole model by the Triton backend against the plain one: layers, cache layout, sampler and all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.workers.kernels.inputs import DEVICE
from tests.workers.test_model_runner import Steps, chunk, make_config, tokens
from tests.workers.tiny_models import make_tiny_checkpoint
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_logits_equal_the_plain_backends(family: str, tmp_path: Path) -> None:
    """With and without norms of heads: a prompt in two chunks, beside a decode, then two decodes."""
    path = make_tiny_checkpoint(tmp_path, family, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    first, second = tokens(40), tokens(25, 1)
    steps = [
        [chunk(0, first, 0, 20)],
        [chunk(0, first, 20, 37), chunk(1, second, 0, 23)],
        [chunk(1, second, 23, 24), chunk(0, first, 37, 39)],
        [chunk(1, second, 24, 25), chunk(0, first, 39, 40)],
    ]
    told = []
    for backend in ("torch", "triton"):
        runner = ModelRunner(make_config(path, attention_backend=backend), DEVICE, SingleCommunicator())
        runner.load_model()
        runner.allocate(150)
        told.append([Steps(runner, step_id).logits(*rows) for step_id, rows in enumerate(steps)])
    for plain, by_triton in zip(*told, strict=True):
        assert plain is not None
        torch.testing.assert_close(by_triton, plain, atol=1e-4, rtol=1e-4)
