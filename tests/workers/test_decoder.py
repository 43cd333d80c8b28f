"""The decoder against transformers for every family, over 1, 2 and 4 ranks, and its bits whatever the chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs.engine import EngineConfig
from tests.workers.ranks import run_ranks
from tests.workers.tiny_models import FAMILIES, load_reference, make_tiny_checkpoint
from workers.forward_context import AttentionMetadata, ForwardContext, forward_context
from workers.model_loader import ModelLoader
from workers.models.decoder import Decoder
from workers.parallel import Communicator

CPU = torch.device("cpu")
BLOCK_SIZE = 16
# Ways to cut 200 tokens into chunks; the first one does not.
CUTS = [[200], [1] * 40 + [160], [2, 3, 5, 7, 33, 64, 86], [100, 1, 99]]
# Each family as tiny_models makes it, then with another choice of K/V heads, tying and biases.
VARIANTS: list[tuple[str, dict[str, Any]]] = [(family, {}) for family in FAMILIES] + [
    ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": False, "vocab_size": 261}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}, "mlp_bias": False}),
    ("mistral", {"num_key_value_heads": 8, "head_dim": 10, "vocab_size": 262}),
    ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    ("qwen3", {"num_key_value_heads": 8, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 32}),
]


def tokens(count: int) -> torch.Tensor:
    return torch.randint(261, (count,), generator=torch.Generator().manual_seed(count))


def load(path: Path, communicator: Communicator | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    config = EngineConfig.create(model=str(path), skip_tokenizer_init=True).resolve()
    return ModelLoader(config).load_model(CPU, communicator, dtype)


@torch.inference_mode()
def compute(model: Decoder, ids: torch.Tensor, chunks: list[int], dtype: torch.dtype) -> torch.Tensor | None:
    """Logits of every token of one sequence that is computed chunk by chunk; None on ranks other than 0."""
    attention = [layer.self_attn.attn for layer in model.layers]
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    shapes = [
        layer.backend.kv_cache_shape(num_blocks, BLOCK_SIZE, layer.num_kv_heads, layer.head_dim) for layer in attention
    ]
    caches = [torch.zeros(shape, dtype=dtype) for shape in shapes]
    parts, start = [], 0
    for chunk in chunks:
        positions = torch.arange(start, start + chunk)
        table = torch.arange(num_blocks)[None]
        metadata = AttentionMetadata([chunk], [start + chunk], positions, table, BLOCK_SIZE)
        with forward_context(ForwardContext(metadata, caches)):
            hidden = model(ids[positions], positions)
        parts.append(model.compute_logits(hidden))
        start += chunk
    return torch.cat([part for part in parts if part is not None]) if parts[0] is not None else None


@pytest.mark.parametrize(("family", "overrides"), VARIANTS, ids=lambda value: str(value))
def test_logits_differ_from_transformers_or_between_ranks(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path, family, **overrides)
    ids = tokens(700)
    with torch.inference_mode():
        wanted = load_reference(path)(ids[None]).logits[0]
    for world_size in (1, 2, 4):
        logits, *others = run_ranks(
            world_size,
            lambda communicator: compute(load(path, communicator), ids, [300, 1, 2, 397], torch.float32),
        )
        assert all(other is None for other in others)
        assert logits is not None
        error = (logits - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-4, f"{world_size} ranks: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "overrides"), [("qwen3", {"intermediate_size": 600}), ("llama", {})], ids=str)
def test_a_tokens_bits_depend_on_how_its_sequence_was_cut(
    family: str, overrides: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    path = make_tiny_checkpoint(tmp_path, family, **overrides)
    ids = tokens(200)
    for world_size in (1, 2):

        def cut(communicator: Communicator) -> list[torch.Tensor | None]:
            model = load(path, communicator, dtype)
            return [compute(model, ids, sizes, dtype) for sizes in CUTS]

        whole, *others = run_ranks(world_size, cut)[0]
        assert whole is not None
        for sizes, other in zip(CUTS[1:], others, strict=True):
            assert other is not None
            assert torch.equal(other, whole), f"{world_size} ranks, chunks {sizes}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_16_bits_lose_more_than_transformers_does(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    path = make_tiny_checkpoint(tmp_path, family, dtype=dtype)
    ids = tokens(300)
    with torch.inference_mode():
        exact = load_reference(path)(ids[None]).logits[0]
        theirs = load_reference(path, dtype)(ids[None]).logits[0].float()
    ours = compute(load(path, dtype=dtype), ids, [300], dtype)
    assert ours is not None
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()


def test_the_original_weights_stay_beside_the_packed_ones(tmp_path: Path) -> None:
    model = load(make_tiny_checkpoint(tmp_path, "llama"))
    left = {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
    assert left == {"embed_tokens.weight"}
