"""A decoder on the native kernels: as near to float32 as its plain twin, and the same bits however it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.engine import EngineConfig
from tests.workers.ranks import run_ranks, shared_group
from tests.workers.test_decoder import compute, tokens
from tests.workers.tiny_models import make_tiny_checkpoint
from workers.model_loader import ModelLoader
from workers.models.decoder import Decoder
from workers.parallel import Communicator, ThreadCommunicator

pytestmark = pytest.mark.usefixtures("native")
# With biases everywhere, with norms of heads, and with more ranks than K/V heads.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen2", {"intermediate_size": 256, "head_dim": 64}),
]
CUTS = [[1] * 10 + [190], [2, 3, 33, 64, 98], [100, 1, 99]]


def load(path: Path, communicator: Communicator, native: bool = True) -> Decoder:
    config = EngineConfig.create(model=str(path), skip_tokenizer_init=True, native_kernels=native).resolve()
    return ModelLoader(config).load_model(torch.device("cpu"), communicator, torch.bfloat16)


@pytest.mark.parametrize(
    ("world_size", "make"), [(1, ThreadCommunicator.group), (2, ThreadCommunicator.group), (2, shared_group)]
)
@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=lambda value: str(value))
def test_logits_differ_between_ways_to_compute_them(
    family: str, overrides: dict[str, Any], world_size: int, make: Any, tmp_path: Path
) -> None:
    shape = {"hidden_size": 96, "intermediate_size": 128, "head_dim": 32} | overrides
    path, ids = make_tiny_checkpoint(tmp_path, family, **shape), tokens(200)

    def by(communicator: Communicator) -> list[torch.Tensor | None]:
        model, twin = load(path, communicator), load(path, communicator, native=False)
        assert model._native_layers is not None
        assert twin._native_layers is None
        found = [compute(model, ids, cut, torch.bfloat16) for cut in ([200], *CUTS)]
        model._native_layers = None
        return [
            compute(twin, ids, [200], torch.bfloat16),
            compute(model, ids, [150, 50], torch.bfloat16),
            *found,
        ]

    plain, whole, *others = run_ranks(world_size, by, make=make)[0]
    assert plain is not None
    assert whole is not None
    for other in others:
        assert other is not None
        assert torch.equal(other, whole)
    config = EngineConfig.create(model=str(path), skip_tokenizer_init=True).resolve()
    exact = run_ranks(1, lambda communicator: compute(
        ModelLoader(config).load_model(torch.device("cpu"), communicator, torch.float32), ids, [200], torch.float32
    ))[0]  # fmt: skip
    assert exact is not None
    assert (whole - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()


def test_a_part_that_the_kernels_cannot_compute_stops_the_rest(tmp_path: Path) -> None:
    """in_features of 100 in down_proj and heads of 16: those go by the plain twins, the rest by the kernels."""
    path, ids = make_tiny_checkpoint(tmp_path, "qwen3", hidden_size=64), tokens(60)
    (found,) = run_ranks(1, lambda communicator: [
        compute(load(path, communicator, native), ids, [59, 1], torch.bfloat16) for native in (True, False)
    ])  # fmt: skip
    mixed, plain = found
    assert mixed is not None
    assert plain is not None
    assert not torch.equal(mixed, plain)
    assert (mixed - plain).abs().mean() < 0.1 * plain.abs().mean()
