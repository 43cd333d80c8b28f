"""The sampler against exact probabilities and transformers' logits warpers; its independence of the batch."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from workers.cpu_sampler import likeliest, scaled_exp
from workers.sampler import SamplingRows, _sample_on_device, keep_weights, sample, uniforms


def make_rows(
    num_rows: int,
    temperature: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    top_p: float | list[float] = 1.0,
    min_p: float | list[float] = 0.0,
    seed: int | list[int] = 0,
    index: int | list[int] = 0,
    position: int | list[int] | None = None,
) -> SamplingRows:
    """Each argument is one value for all rows or a list; positions count up unless given."""
    position = list(range(num_rows)) if position is None else position
    full = lambda value, dtype: np.broadcast_to(np.array(value, dtype=dtype), (num_rows,)).copy()  # noqa: E731
    return SamplingRows(
        temperature=full(temperature, np.float64),
        top_k=full(top_k, np.int64),
        top_p=full(top_p, np.float64),
        min_p=full(min_p, np.float64),
        seed=full(seed, np.uint64),
        index=full(index, np.uint64),
        position=full(position, np.uint64),
    )


def normal_logits(num_rows: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def chi_square(ids: np.ndarray, probabilities: torch.Tensor) -> float:
    """Pearson's statistic, in standard deviations above its mean; tokens of probability 0 must not occur."""
    counts = np.bincount(ids, minlength=len(probabilities))
    kept = (probabilities > 0).numpy()
    assert not counts[~kept].any()
    expected = probabilities.numpy()[kept] * len(ids)
    freedom = kept.sum() - 1
    return float((((counts[kept] - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_draws_follow_the_exact_probabilities(params: dict[str, float]) -> None:
    """20,000 draws at as many positions, compared with the warped softmax in float64."""
    logits = normal_logits(1, 40)
    ids = sample(logits.expand(20_000, -1).contiguous(), make_rows(20_000, **params))
    probabilities = warped(logits, **params)[0].double().softmax(-1)
    assert abs(chi_square(ids, probabilities)) < 4


def warped(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> torch.Tensor:
    """transformers' logits warpers in our order; dropped tokens are -inf."""
    ids = torch.zeros(len(logits), 1, dtype=torch.long)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if 0 < top_k < logits.shape[-1] else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p > 0 else []
    for warper in warpers:
        logits = warper(ids, logits)
    return logits


def test_kept_sets_equal_transformers_warpers() -> None:
    """Random parameters, a different mixture in each row of one batch; flat rows need the whole sort of top-p."""
    rng = random.Random(0)
    num_rows, vocab_size = 60, 3000
    logits = (
        normal_logits(num_rows, vocab_size) * torch.tensor([rng.choice([0.05, 1, 3]) for _ in range(num_rows)])[:, None]
    )
    each = [
        {
            "temperature": rng.choice([0.3, 1.0, 1.7]),
            "top_k": rng.choice([0, 1, 7, 1500, vocab_size, 10**9]),
            "top_p": rng.choice([1.0, 0.95, 0.5, 1e-6]),
            "min_p": rng.choice([0.0, 0.01, 0.5, 1.0]),
        }
        for _ in range(num_rows)
    ]
    rows = make_rows(num_rows, **{name: [params[name] for params in each] for name in each[0]})
    weights = keep_weights(logits, rows)
    for i, params in enumerate(each):
        expected = warped(logits[i : i + 1], **params)[0]
        # What the warpers keep at less than 2**-37 of the likeliest may be gone.
        assert not (weights[i] > 0)[expected == -torch.inf].any(), params
        assert (weights[i] > 0)[expected > expected.max() - 25].all(), params
        share = weights[i].double() / weights[i].sum()
        torch.testing.assert_close(share, expected.double().softmax(-1), atol=1e-6, rtol=1e-4)


def test_ties_at_a_threshold_are_all_kept() -> None:
    """Equally likely tokens are not told apart by their place in a sort."""
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert (keep_weights(logits, make_rows(1, top_k=2)) > 0).tolist() == [[False, True, True, True, False]]
    assert (keep_weights(logits, make_rows(1, top_p=0.7)) > 0).tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.01},
        {"temperature": 1e-30},
        {"top_p": 0.0},
        {"top_p": 1e-9},
        {"top_k": 1},
        {"min_p": 1.0},
    ],
)
def test_extreme_parameters_leave_the_likeliest_token(params: dict[str, float]) -> None:
    """Temperatures near 0 neither divide by zero nor overflow, and no threshold drops every token (trap 43)."""
    logits = 100 * normal_logits(50, 300)
    assert np.array_equal(sample(logits, make_rows(50, **params)), logits.argmax(-1).numpy())


@pytest.mark.parametrize("params", [{"top_k": 10**12}, {"top_k": -1}, {"top_k": 300}, {"top_p": 1.0}, {"min_p": 0.0}])
def test_parameters_that_keep_all_change_nothing(params: dict[str, float]) -> None:
    logits = normal_logits(50, 300)
    assert np.array_equal(sample(logits, make_rows(50, **params)), sample(logits, make_rows(50)))


def test_greedy_takes_the_lowest_of_equal_ids() -> None:
    logits = torch.zeros(3, 5000)
    logits[1, 4321] = logits[1, 77] = 2
    logits[2] = -torch.inf
    logits[2, 9] = -5
    assert sample(logits, make_rows(3, temperature=0, top_k=3, top_p=0.1, min_p=0.9)).tolist() == [0, 77, 9]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    """Masked ids stand before, between and behind the kept ones, and the uniform comes near both ends."""
    logits = torch.full((4000, 9), -torch.inf)
    logits[:, [2, 5, 6]] = torch.tensor([0.0, 1.0, -2.0])
    assert set(sample(logits, make_rows(4000))) == {2, 5, 6}


def test_the_uniform_at_its_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 takes the first token with weight, the largest uniform below 1 the last one."""
    logits = torch.tensor([[-torch.inf, 1.0, 0.5, 0.2, -torch.inf]]).repeat(2, 1)
    monkeypatch.setattr("workers.sampler.uniforms", lambda *_: np.array([0.0, 1 - 2.0**-53]))
    assert sample(logits, make_rows(2)).tolist() == [1, 3]


def test_same_seed_same_token_whatever_the_batch() -> None:
    """A row alone, among others, in another order, and cut into chunks of rows: the same token (trap 44)."""
    rng = random.Random(1)
    num_rows, vocab_size = 64, 1031
    logits = normal_logits(num_rows, vocab_size)
    rows = make_rows(
        num_rows,
        temperature=[rng.choice([0, 0.5, 1.0, 3.0]) for _ in range(num_rows)],
        top_k=[rng.choice([0, 10, 2000]) for _ in range(num_rows)],
        top_p=[rng.choice([1.0, 0.9]) for _ in range(num_rows)],
        min_p=[rng.choice([0.0, 0.05]) for _ in range(num_rows)],
        seed=[rng.randrange(2**63) for _ in range(num_rows)],
    )
    together = sample(logits, rows)
    weights = keep_weights(logits, make_rows(num_rows))
    for i in range(num_rows):
        assert sample(logits[i : i + 1], rows.take(np.array([i])))[0] == together[i]
        assert torch.equal(keep_weights(logits[i : i + 1].clone(), make_rows(1))[0], weights[i])
    order = np.random.default_rng(0).permutation(num_rows)
    assert np.array_equal(sample(logits[torch.from_numpy(order)], rows.take(order)), together[order])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workers.sampler.CHUNK_ELEMENTS", 5 * vocab_size)
        assert np.array_equal(sample(logits, rows), together)


@pytest.mark.parametrize("vocab_size", [1, 2, 97, 1031, 20_011])
def test_the_cpus_draw_differs_from_its_twin(vocab_size: int) -> None:
    """Both make the same token of the same numbers; ties as of bfloat16, masks, peaked and flat rows."""
    rng = random.Random(vocab_size)
    num_rows = 32
    for spread in (0.01, 1.0, 30.0):
        logits = spread * normal_logits(num_rows, vocab_size)
        logits[::2] = logits[::2].bfloat16().float()
        logits[::5, vocab_size // 3 : -1] = -torch.inf
        rows = make_rows(
            num_rows,
            temperature=[rng.choice([0, 0.01, 0.5, 1.0, 3.0]) for _ in range(num_rows)],
            top_k=[rng.choice([0, 1, 5, 50, vocab_size // 2, vocab_size]) for _ in range(num_rows)],
            top_p=[rng.choice([1.0, 0.99, 0.9, 0.3, 1e-6]) for _ in range(num_rows)],
            min_p=[rng.choice([0.0, 0.0, 0.01, 0.5, 1.0]) for _ in range(num_rows)],
            seed=[rng.randrange(2**63) for _ in range(num_rows)],
        )
        uniform = uniforms(rows.seed, rows.index, rows.position)
        expected = _sample_on_device(logits, rows, uniform)
        assert np.array_equal(sample(logits, rows), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("workers.sampler.CHUNK_ELEMENTS", 5 * vocab_size)
            assert np.array_equal(_sample_on_device(logits, rows, uniform), expected)


@pytest.mark.parametrize("k", [1, 2, 24, 25, 100, 599, 600])
def test_the_likeliest_are_those_of_a_sort(k: int) -> None:
    """600 logits: a grid of several heights, with a rest behind it, and none; few values, so that many tie."""
    for step in (1e-4, 0.5, 4.0):
        row = (normal_logits(1, 600, seed=k)[0] / step).round().mul(step).numpy()
        assert likeliest(row, k).tolist() == np.flatnonzero(row >= np.sort(row)[-k]).tolist()


def test_the_exponential_of_an_element_depends_on_its_place() -> None:
    """Vectorised loops have a tail; a row's candidates stand elsewhere than the row's elements."""
    values = -40 * np.random.default_rng(0).random(5000, dtype=np.float32)
    whole = scaled_exp(values, 1000)
    for start in range(0, 4000, 37):
        for length in (1, 2, 3, 7, 15, 16, 17, 33, 1000):
            assert np.array_equal(scaled_exp(values[start : start + length], 1000), whole[start : start + length])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_row_gives_an_id_all_the_same(broken: float) -> None:
    logits = torch.zeros(2, 500)
    logits[0] = broken
    logits[1, 7] = broken if broken > 0 else torch.nan
    for params in ({}, {"top_k": 5}, {"top_p": 0.5, "min_p": 0.1}):
        ids = sample(logits, make_rows(2, **params))
        assert ((ids >= 0) & (ids < 500)).all()


def test_samples_of_one_prompt_draw_independently() -> None:
    """The first tokens of n sequences share logits, seed and position, and differ in the index alone (trap 45)."""
    count = 20_000
    numbers = np.arange(count, dtype=np.uint64)
    fixed = np.full(count, 7, dtype=np.uint64)
    by_index, by_position, by_seed = (
        uniforms(fixed, numbers, fixed), uniforms(fixed, fixed, numbers), uniforms(numbers, fixed, fixed),
    )  # fmt: skip
    for drawn in (by_index, by_position, by_seed):
        assert drawn.min() >= 0
        assert drawn.max() < 1
        assert len(np.unique(drawn)) == count
        counts = np.histogram(drawn, bins=50, range=(0, 1))[0]
        assert abs(((counts - 400) ** 2 / 400).sum() - 49) < 45
        assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(by_index, by_position)[0, 1]) < 0.03
    # Index and position must not be interchangeable.
    swapped = uniforms(fixed, numbers + np.uint64(count), fixed)
    assert not np.isin(swapped, uniforms(fixed, fixed, numbers + np.uint64(count))).any()


def test_the_uniform_is_pinned() -> None:
    """The counter's function is part of what a seed means: a journal replayed by a later version must agree."""
    one = np.array([1], dtype=np.uint64)
    assert uniforms(one, one * np.uint64(2), one * np.uint64(3)).tolist() == [PINNED]
    largest = np.array([2**63 - 1], dtype=np.uint64)
    assert 0 <= uniforms(largest, largest, largest)[0] < 1


PINNED = 0.814259011529328
