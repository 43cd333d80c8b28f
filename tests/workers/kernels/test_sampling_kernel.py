"""The sampling kernel chooses the tokens that `workers.sampler` chooses, of which it is the fast twin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.workers.kernels.inputs import DEVICE
from workers import sampler
from workers.kernels import sampling
from workers.sampler import SamplingRows


def draw_rows(rng: np.random.Generator, number: int) -> SamplingRows:
    """Parameters of every kind, those at the ends of their ranges included."""
    return SamplingRows(
        temperature=rng.choice([0.0, 1e-3, 0.3, 0.6, 1.0, 2.0], number),
        top_k=rng.choice([0, 1, 2, 20, 50, 10**6], number),
        top_p=rng.choice([1.0, 0.95, 0.5, 1e-6], number),
        min_p=rng.choice([0.0, 0.0, 0.05, 1.0], number),
        seed=rng.integers(0, 2**63, number, dtype=np.uint64),
        index=np.zeros(number, np.uint64),
        position=rng.integers(0, 10**6, number, dtype=np.uint64),
    )


def sampled(logits: torch.Tensor, rows: SamplingRows) -> list[int]:
    """What the kernel chooses."""
    ids: list[int] = sampling.sample(logits.to(DEVICE), sampling.DeviceRows.make(rows, DEVICE)).tolist()
    return ids


@pytest.mark.parametrize("vocab_size", [1, 2, 100, 1000, 4096, 9001])
def test_tokens_equal_the_twins(vocab_size: int) -> None:
    """Flat and peaked rows, rows full of ties, rows with forbidden tokens; all parameters at once."""
    rng = np.random.default_rng(vocab_size)
    number = 10
    logits = torch.from_numpy(rng.standard_normal((number, vocab_size)).astype(np.float32))
    logits *= torch.from_numpy(rng.choice([0.1, 1.0, 8.0], (number, 1)).astype(np.float32))
    logits[:3] = logits[:3].round()
    logits[2:5, 1::3] = -torch.inf
    rows = draw_rows(rng, number)
    assert sampled(logits, rows) == sampler.sample(logits.clone(), rows).tolist()


def test_bfloat16_logits_give_what_their_float32_gives() -> None:
    """A step of rows that are sampled as they come needs no float32 copy of its logits."""
    rng = np.random.default_rng(5)
    logits = torch.from_numpy(rng.standard_normal((8, 1000)).astype(np.float32)).bfloat16()
    rows = draw_rows(rng, 8)
    assert sampled(logits, rows) == sampler.sample(logits.float(), rows).tolist()


def test_greedy_takes_the_first_of_equals_and_nan_before_all() -> None:
    """As torch.argmax does, and with -0 equal to 0."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0.0, 3, 3, 1], [-0.0, 0.0, -1, -1], [1, inf, nan, nan], [-inf] * 4, [-2, -1, -3, -1]])
    rows = draw_rows(np.random.default_rng(0), len(logits))
    rows.temperature[:] = 0
    assert sampled(logits, rows) == [1, 0, 2, 0, 1] == logits.argmax(dim=-1).tolist()


def test_broken_rows_give_an_id_all_the_same() -> None:
    """A model that returns NaN, infinities or nothing but -inf must not make an id outside the vocabulary."""
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[nan] * 5, [1, nan, 2, 3, 4], [inf, inf, 0, 0, 0], [-inf] * 5])
    rows = draw_rows(np.random.default_rng(1), len(logits))
    rows.temperature[:] = 0.7
    assert sampled(logits, rows) == [0, 1, 0, 0]


def test_row_does_not_depend_on_its_neighbours() -> None:
    """The same row, parameters and uniform give the same token alone and in any batch."""
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(rng.standard_normal((6, 500)).astype(np.float32))
    rows = draw_rows(rng, 6)
    together = sampled(logits, rows)
    assert [sampled(logits[[i]], rows.take(np.array([i])))[0] for i in range(6)] == together
