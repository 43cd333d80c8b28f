"""How long a stream waits for its next token while long prompts flood in, under an invented clock."""

from __future__ import annotations

import pytest

from nanoengine.step import StepInput
from nanoengine.step_costs import MIXED_STEPS, PROBE_TOKENS, StepCosts
from tests.nanoengine.scheduler_driver import Driver, expected_output, prompt_of

UNDISTURBED = 0.010
PREFILL_TOKEN = 0.0005


def seconds_of(step: StepInput) -> float:
    """A step of decodes alone takes UNDISTURBED, whatever their number."""
    return UNDISTURBED + PREFILL_TOKEN * sum(len(row.token_ids) for row in step.rows if len(row.token_ids) > 1)


def longest_gap(async_scheduling: bool, max_decode_gap: float, **limits: int) -> tuple[float, Driver]:
    """Seconds between two tokens of a stream at worst, after it ran alone for a while and then among long prompts."""
    driver = Driver(
        async_scheduling, **{"max_num_batched_tokens": 512, "num_kv_blocks": 4096, "max_model_len": 2048} | limits,
        max_decode_gap=max_decode_gap,
    )  # fmt: skip
    driver.step_seconds = seconds_of
    driver.add("stream", prompt_of(4), max_tokens=300)
    for _ in range(10):
        driver.step()
    for i in range(8):
        driver.add(f"flood{i}", prompt_of(1000, i), max_tokens=1)
    gaps, last, count = [], driver.now, len(driver.tokens["stream"])
    while driver.scheduler.has_work:
        driver.step()
        if len(driver.tokens["stream"]) > count:
            gaps.append(driver.now - last)
            last, count = driver.now, len(driver.tokens["stream"])
    driver.run()
    assert driver.tokens["stream"] == expected_output(prompt_of(4), 300)
    assert all(driver.tokens[f"flood{i}"] == expected_output(prompt_of(1000, i), 1) for i in range(8))
    return max(gaps), driver


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("max_decode_gap", [1.5, 3, 8])
def test_gap_of_a_stream_is_bounded_under_a_flood_of_prompts(async_scheduling: bool, max_decode_gap: float) -> None:
    gap, driver = longest_gap(async_scheduling, max_decode_gap)
    assert gap <= max_decode_gap * UNDISTURBED * 1.05
    # And what the bound leaves is used: the flood is through about as soon as it can be.
    mixed = [step for step in driver.steps if len(step.rows) > 1]
    assert len(mixed) < 1.3 * 8 * 1000 / ((max_decode_gap - 1) * UNDISTURBED / PREFILL_TOKEN) + 20


def test_without_a_bound_prompts_fill_the_budget() -> None:
    gap, _ = longest_gap(False, 0)
    assert gap > 20 * UNDISTURBED


def test_prompts_that_may_not_be_split_are_not_held_up() -> None:
    _, driver = longest_gap(False, 3, enable_chunked_prefill=False, max_num_batched_tokens=4096)
    assert all(driver.finished[f"flood{i}"] == "length" for i in range(8))


def test_prompts_progress_however_small_the_bound() -> None:
    costs = StepCosts(1.0)
    costs.observe(1, 0, 0.01)
    costs.observe(1, 100, 5.0)
    assert costs.max_prefill_tokens() == 1


def test_costs_are_learnt_from_measured_steps_only() -> None:
    costs = StepCosts(3.0)
    assert costs.max_prefill_tokens() is None
    costs.observe(0, 100, 0.1)
    assert costs.max_prefill_tokens() == 0, "a step of decodes alone is wanted first"
    costs.observe(2, 0, 0.01)
    assert costs.max_prefill_tokens() == 20
    fresh = StepCosts(3.0)
    fresh.observe(2, 0, 0.01)
    assert fresh.max_prefill_tokens() == PROBE_TOKENS
    fresh.observe(2, 0, 0.0)
    assert fresh.max_prefill_tokens() is None


def test_undisturbed_time_is_measured_again_during_a_long_flood() -> None:
    costs = StepCosts(3.0)
    costs.observe(1, 0, 5.0)  # the first one compiled something
    for _ in range(MIXED_STEPS):
        assert costs.max_prefill_tokens() != 0
        costs.observe(1, 100, 0.1)
    assert costs.max_prefill_tokens() == 0
    costs.observe(1, 0, 0.01)
    assert costs.max_prefill_tokens() != 0
