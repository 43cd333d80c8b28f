"""The torch backend against dense attention in float64, on random mixed batches; its registry; the layer."""

from __future__ import annotations

import random

import pytest
import torch

from configs.errors import ConfigError
from tests.workers.attention_batches import Sequences, random_chunks
from workers.attention import get_backend
from workers.attention.torch_backend import TorchBackend
from workers.forward_context import ForwardContext, forward_context
from workers.layers.attention import Attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("block_size", [1, 4, 7, 16, 100])
@pytest.mark.parametrize(("num_kv_heads", "group"), [(1, 1), (2, 2), (1, 7), (2, 12), (1, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixed_batches_equal_dense_attention(
    block_size: int, num_kv_heads: int, group: int, dtype: torch.dtype
) -> None:
    """Any mixture of decodes and chunks; unused slots hold NaN, so reading one shows."""
    rng = random.Random(f"{block_size} {num_kv_heads} {group} {dtype}")
    lengths = [rng.choice([1, 2, 15, 16, 17, 63, 64, 65, rng.randint(1, 300)]) for _ in range(rng.randint(1, 12))]
    head_dim = rng.choice([8, 16, 40, 64])
    made = Sequences.make(lengths, num_kv_heads, group, head_dim, block_size, dtype, seed=rng.randrange(1000))
    for _ in range(2):
        chunks = random_chunks(lengths, rng)
        for chunk, out in zip(chunks, made.attend(chunks), strict=True):
            assert out.dtype == dtype
            torch.testing.assert_close(out.double(), made.reference(*chunk), atol=TOLERANCE[dtype], rtol=0)


def test_long_context_equals_dense_attention() -> None:
    """Past the kernel's key tile of 512, prefilled in one chunk and decoded."""
    made = Sequences.make([1500, 1100, 700, 513], head_dim=64)
    chunks = [(0, 0, 1500), (1, 1099, 1100), (2, 699, 700), (3, 512, 513)]
    for chunk, out in zip(chunks, made.attend(chunks), strict=True):
        torch.testing.assert_close(out.double(), made.reference(*chunk), atol=2e-6, rtol=0)


def test_many_decodes_split_over_several_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gather that would not fit its workspace is cut, and no sequence is lost or done twice."""
    monkeypatch.setattr("workers.attention.torch_backend.WORKSPACE_BYTES", 50_000)
    lengths = [1 + 11 * (i % 13) for i in range(40)]
    made = Sequences.make(lengths)
    chunks = [(seq, length - 1, length) for seq, length in enumerate(lengths)]
    for chunk, out in zip(chunks, made.attend(chunks), strict=True):
        torch.testing.assert_close(out.double(), made.reference(*chunk), atol=2e-6, rtol=0)


def test_nan_in_unused_slots_does_not_poison() -> None:
    """A masked weight of 0 times a stale NaN would be NaN: block 0 and the tail of a block hold NaN here."""
    made = Sequences.make([5, 70], block_size=16)
    assert made.cache.isnan().any()
    assert made.cache[0].isnan().all()
    assert not any(out.isnan().any() for out in made.attend([(0, 4, 5), (1, 0, 70)]))


def test_chunk_does_not_see_later_keys() -> None:
    """Key length is the chunk's end, not the sequence's (trap 12), although later keys lie in the cache already."""
    made = Sequences.make([64])
    (early,) = made.attend([(0, 8, 20)])
    torch.testing.assert_close(early.double(), made.reference(0, 8, 20), atol=2e-6, rtol=0)


def test_store_writes_only_its_slots() -> None:
    """Slots of other tokens keep their bits."""
    made = Sequences.make([20, 20], block_size=4)
    before = made.cache.clone()
    slot = torch.tensor([made.tables[1][2] * 4 + 3])
    k, v = torch.ones(1, 2, 16), torch.full((1, 2, 16), 2.0)
    made.backend.store(made.cache, k, v, slot)
    assert made.cache[made.tables[1][2], 3, 0].eq(1).all()
    assert made.cache[made.tables[1][2], 3, 1].eq(2).all()
    made.cache[made.tables[1][2], 3] = before[made.tables[1][2], 3]
    assert torch.equal(made.cache.nan_to_num(), before.nan_to_num())


def test_layer_stores_then_attends_in_its_own_cache() -> None:
    """A token must see its own key; layer 1 must not touch layer 0's cache."""
    made = Sequences.make([9])
    empty = torch.full_like(made.cache, torch.nan)
    caches = [empty.clone(), empty.clone()]
    layer = Attention(1, 4, 2, 16, made.scale, made.backend)
    with forward_context(ForwardContext(made.metadata([(0, 0, 9)]), caches)):
        out = layer(made.q[0], made.k[0], made.v[0])
    torch.testing.assert_close(out.double(), made.reference(0, 0, 9), atol=2e-6, rtol=0)
    assert caches[0].isnan().all()


def test_registry_is_lazy_and_names_what_it_knows() -> None:
    assert isinstance(get_backend("auto", torch.device("cpu")), TorchBackend)
    with pytest.raises(ConfigError, match="one of auto, torch"):
        get_backend("nonsense", torch.device("cpu"))


def test_block_is_the_first_axis() -> None:
    """Block copies and swapping index axis 0 of every layer's cache."""
    assert TorchBackend(torch.device("cpu")).kv_cache_shape(11, 16, 2, 64)[0] == 11
