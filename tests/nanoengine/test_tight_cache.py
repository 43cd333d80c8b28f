"""A K/V cache of a tenth of what is open at once: everything ends with its own tokens, and without thrashing."""

from __future__ import annotations

from typing import Any

import pytest

from nanoengine.beam_params import BeamSearchParams
from tests.nanoengine.scheduler_driver import Driver, expected_output, expected_prompt_logprobs, output_name
from tests.nanoengine.test_beam_group import BeamDriver, expected_beams

NUM_BLOCKS, BLOCK_SIZE = 64, 4
NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 40, 24, 40
MODES: list[dict[str, Any]] = [
    {"preemption_mode": "recompute"},
    {"preemption_mode": "recompute", "num_host_blocks": 200},
    {"preemption_mode": "swap", "num_host_blocks": 200},
    {"preemption_mode": "swap", "num_host_blocks": 16},
    {"preemption_mode": "recompute", "enable_prefix_caching": False},
]


def prompt_of(number: int) -> list[int]:
    """Every other one shares half of its prompt with others."""
    shared = [7] * (PROMPT_TOKENS // 2) if number % 2 else [100 + number] * (PROMPT_TOKENS // 2)
    return [*shared, *range(200 + number, 200 + number + PROMPT_TOKENS // 2)]


def fill(driver: Driver, **params: Any) -> None:
    for number in range(NUM_REQUESTS):
        driver.add(str(number), prompt_of(number), **({"max_tokens": NEW_TOKENS} | params))


def check_effort(driver: Driver, num_sequences: int) -> None:
    """Work that was done twice is bounded: what runs comes to its end rather than give way for ever."""
    least = num_sequences * (PROMPT_TOKENS + NEW_TOKENS)
    assert driver.scheduler.totals.num_step_tokens <= 1.5 * least
    assert driver.scheduler.num_preemptions <= 1.5 * num_sequences


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_ten_times_as_many_tokens_as_fit(mode: dict[str, Any]) -> None:
    assert NUM_REQUESTS * (PROMPT_TOKENS + NEW_TOKENS) >= 10 * NUM_BLOCKS * BLOCK_SIZE
    driver = Driver(True, num_kv_blocks=NUM_BLOCKS, max_num_seqs=NUM_REQUESTS, **mode)
    fill(driver)
    driver.run()
    for number in range(NUM_REQUESTS):
        assert driver.tokens[str(number)] == expected_output(prompt_of(number), NEW_TOKENS)
    assert driver.scheduler.num_preemptions > 0
    check_effort(driver, NUM_REQUESTS)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_several_outputs_each_and_log_probabilities_of_their_prompts(mode: dict[str, Any]) -> None:
    driver = Driver(True, num_kv_blocks=NUM_BLOCKS, max_num_seqs=NUM_REQUESTS, **mode)
    fill(driver, n=3, temperature=1.0, prompt_logprobs=1)
    driver.run()
    for number in range(NUM_REQUESTS):
        for index in range(3):
            tokens = driver.tokens[output_name(str(number), index)]
            assert tokens == expected_output(prompt_of(number), NEW_TOKENS, index)
        assert driver.prompt_logprobs[str(number)] == expected_prompt_logprobs(prompt_of(number))
    check_effort(driver, 3 * NUM_REQUESTS)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_beam_searches(mode: dict[str, Any]) -> None:
    width, num_searches = 4, 12
    params = BeamSearchParams(width, NEW_TOKENS, ignore_eos=True)
    assert num_searches * width * (PROMPT_TOKENS + NEW_TOKENS) >= 10 * NUM_BLOCKS * BLOCK_SIZE
    driver = BeamDriver(True, num_kv_blocks=NUM_BLOCKS, max_num_seqs=NUM_REQUESTS, **mode)
    for number in range(num_searches):
        driver.search(str(number), prompt_of(number), **params.to_dict())
    driver.run()
    for number in range(num_searches):
        assert driver.found(str(number)) == expected_beams(prompt_of(number), params, NEW_TOKENS)
    assert driver.scheduler.num_preemptions > 0
    check_effort(driver, num_searches * width)
