"""Paged attention in Triton against dense attention in float64, on random mixed batches, and against its twin."""

from __future__ import annotations

import random

import pytest
import torch

from configs.errors import ConfigError
from tests.workers.attention_batches import Sequences, random_chunks
from tests.workers.kernels.inputs import DEVICE, DTYPES, TOLERANCE
from workers.attention import get_backend
from workers.attention.triton_backend import TritonBackend
from workers.kernels import attention, is_interpreted


def make(lengths: list[int], *args: object, **options: object) -> Sequences:
    """Sequences whose cache lies where the kernels run."""
    made = Sequences.make(lengths, *args, backend=TritonBackend(DEVICE), **options)  # type: ignore[arg-type]
    made.cache = made.cache.to(DEVICE)
    made.q = [q.to(DEVICE) for q in made.q]
    return made


def assert_attends(made: Sequences, chunks: list[tuple[int, int, int]]) -> None:
    """Every chunk's output equals the reference; slots that hold no token are NaN, so that reading one shows."""
    dtype = made.cache.dtype
    for chunk, out in zip(chunks, made.attend(chunks), strict=True):
        assert out.dtype == dtype
        wanted = made.reference(*chunk)
        torch.testing.assert_close(out.cpu().double(), wanted, atol=1.5 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(16))
def test_mixed_batches_equal_dense_attention(seed: int) -> None:
    """Decodes and chunks in any mixture, shapes drawn at random."""
    rng = random.Random(seed)
    num_kv_heads, group = rng.choice([(1, 1), (2, 2), (1, 7), (2, 4), (1, 20)])
    lengths = [rng.choice([1, 2, 15, 16, 17, 63, 64, 65, rng.randint(1, 200)]) for _ in range(rng.randint(1, 4))]
    head_dim, block_size = rng.choice([16, 64, 80, 96, 128, 256]), rng.choice([16, 16, 17, 32, 100])
    made = make(lengths, num_kv_heads, group, head_dim, block_size, DTYPES[seed % 3], seed=seed)
    assert_attends(made, random_chunks(lengths, rng))
    assert_attends(made, [(seq, length - 1, length) for seq, length in enumerate(lengths)])


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_any_number_of_splits_gives_the_same(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More shares than tiles of keys, shares that end with a sequence, and shares that have no keys at all."""
    monkeypatch.setattr(attention, "num_splits", lambda *_: splits)
    lengths = [1, 31, 64, 65, 200]
    made = make(lengths, head_dim=64)
    assert_attends(made, [(seq, length - 1, length) for seq, length in enumerate(lengths)])


def test_chunk_does_not_see_later_keys() -> None:
    """Key length is the chunk's end, not the sequence's (trap 12), although later keys lie in the cache already."""
    made = make([150], head_dim=32)
    assert_attends(made, [(0, 70, 100)])
    assert_attends(made, [(0, 99, 100)])


@pytest.mark.parametrize("splits", [1, 4])
def test_row_without_keys_is_zero(splits: int) -> None:
    """Padding of a captured batch has length 0: it must neither be NaN nor read a block."""
    made = make([40], head_dim=64)
    q = torch.cat((made.q[0][39:40], made.q[0][:2]))
    tables = torch.tensor([made.tables[0], [10**6] * 3, [-1] * 3], device=DEVICE)
    out = torch.full_like(q, torch.nan)
    lengths = torch.tensor([40, 0, 0], device=DEVICE)
    attention.decode_attention(q, made.cache, tables, lengths, made.scale, splits, out)
    assert out[1:].eq(0).all()
    torch.testing.assert_close(out[0].cpu().double(), made.reference(0, 39, 40)[0], atol=2e-6, rtol=0)


def test_number_of_splits_fills_the_device_and_no_more() -> None:
    """One stream is split widely, a full batch not at all, and short keys are not cut into crumbs."""
    assert attention.num_splits(1, 8, 8192, 132) == 64
    assert attention.num_splits(1, 8, 300, 132) == 3
    assert attention.num_splits(256, 8, 8192, 132) == 1
    assert attention.num_splits(8, 8, 8192, 132) == 8


def test_tiles_cover_each_token_once() -> None:
    """Chunks longer than a tile are cut; the tile with the most keys comes first."""
    numbers = attention.plan_tiles([(3, 5, 100, 70), (4, 75, 0, 1)], group=4, head_dim=128, itemsize=2)
    tiles = list(zip(*[iter(numbers)] * 4, strict=True))
    assert tiles == [(3, 69, 164, 6), (3, 37, 132, 32), (3, 5, 100, 32), (4, 75, 0, 1)]


@pytest.mark.skipif(not is_interpreted(), reason="a GPU runs it")
def test_cpu_is_refused_unless_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own error would be about a missing driver, and auto must never choose it there."""
    assert isinstance(get_backend("triton", torch.device("cpu")), TritonBackend)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ConfigError, match="triton needs a GPU, the device is cpu"):
        get_backend("triton", torch.device("cpu"))
