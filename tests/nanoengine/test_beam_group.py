"""Beam searches in the real scheduler, over invented workers that read what really is in the blocks."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanoengine.beam_params import BeamSearchParams
from nanoengine.beam_search import BeamSearch
from nanoengine.step import PREVIOUS_SAMPLE, Epoch, StepInput, StepOutput, TokenLogprobs
from tests.nanoengine.scheduler_driver import EOS, VOCAB, Driver, FakeWorkers, expected_output, output_name

WIDTH = 4


def invented_told(context: list[int], number: int) -> TokenLogprobs:
    """What the invented model tells of the tokens after `context`: a function of all of it, eos among them at times."""
    draw = random.Random(repr(context))
    ids = draw.sample(range(3, VOCAB), number)
    if draw.random() < 0.3:
        ids[draw.randrange(min(4, number))] = EOS
    values = sorted((-draw.random() * 3 for _ in ids), reverse=True)
    return [0, *ids], [-99.0, *values], number + 1


def expected_beams(prompt: list[int], params: BeamSearchParams, max_tokens: int) -> list[tuple[list[int], str]]:
    """Tokens and finish reason of each output of an undisturbed search."""
    search = BeamSearch(params, max_tokens, frozenset({EOS}))
    contexts = [prompt]
    while not search.is_over:
        told = [invented_told(context, search.num_likeliest) for context in contexts]
        contexts = [[*contexts[parent], token] for parent, token in search.advance(told)]
    return [
        ([beam.token_id for beam in each.beam.path()], "stop" if each.stopped else "length")
        for each in search.hypotheses
    ]


class BeamWorkers:
    """Has invented workers also tell the likeliest tokens, to the rows that ask for them."""

    def __init__(self, workers: FakeWorkers) -> None:
        self.workers = workers
        self.numbers: dict[int, int] = {}

    def run(self, step: StepInput) -> StepOutput:
        output, slots, size = self.workers.run(step), self.workers.slots, self.workers.block_size
        for number, row in enumerate(step.rows):
            if row.params is not None:
                self.numbers[row.seq_id] = -1 if row.extras is None else row.extras.num_logprobs
            if row.sample and self.numbers[row.seq_id] >= 0:
                table, end = self.workers.tables[row.seq_id], row.num_computed_tokens + len(row.token_ids)
                context = [slots[table[p // size], p % size] for p in range(end)]
                output.logprobs[number] = [invented_told(context, self.numbers[row.seq_id])]
        return StepOutput.unpack(output_columns(output))

    def lose_everything(self) -> None:
        self.workers.lose_everything()


def output_columns(output: StepOutput) -> Any:
    import pickle

    return pickle.loads(output.pack())  # noqa: S301 - our own bytes, a moment old


class BeamDriver(Driver):
    """A driver that also starts searches. Each of their outputs comes in one delta."""

    def __init__(self, async_scheduling: bool = False, **limits: Any) -> None:
        super().__init__(async_scheduling, **limits)
        self.workers: Any = BeamWorkers(self.workers)

    def search(self, request_id: str, prompt: list[int], timeout: float | None = None, **params: Any) -> None:
        beams = BeamSearchParams(**({"beam_width": WIDTH, "max_tokens": 8} | params))
        self.add(request_id, prompt, timeout=timeout, beams=beams)

    def found(self, request_id: str, width: int = WIDTH) -> list[tuple[list[int], str]]:
        """Tokens and finish reason of each output of a search that is over."""
        names = [output_name(request_id, index) for index in range(width)]
        return [(self.tokens[name], self.finished[name]) for name in names]


PROMPT = [5, 6, 7, 8, 9, 10, 11]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"block_size": 1},
    {"block_size": 16, "num_kv_blocks": 16},
    {"enable_prefix_caching": False},
    {"max_num_batched_tokens": 1},
    {"max_num_batched_tokens": 3},
    {"max_num_seqs": 1},
    {"max_num_seqs": 3, "enable_prefix_caching": False},
    {"num_kv_blocks": 6},
    {"num_kv_blocks": 5, "enable_prefix_caching": False, "max_num_batched_tokens": 2},
    {"num_kv_blocks": 6, "max_num_seqs": 2, "policy": "priority"},
    {"enable_chunked_prefill": False, "num_kv_blocks": 8},
    {"num_kv_blocks": 6, "preemption_mode": "swap", "num_host_blocks": 40},
    {"num_kv_blocks": 6, "preemption_mode": "swap", "num_host_blocks": 5, "enable_prefix_caching": False},
]


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_beams_are_those_of_an_undisturbed_search(settings: dict[str, Any], async_scheduling: bool) -> None:
    driver = BeamDriver(async_scheduling, **settings)
    for number, length in enumerate((1, 4, 7, 8)):
        params = BeamSearchParams(WIDTH, 8, length_penalty=(0.0, 1.0, -1.0, 2.0)[number], early_stopping=number == 3)
        driver.search(f"s{number}", PROMPT[:length] + [number], **params.to_dict())
        driver.run()
        assert driver.found(f"s{number}") == expected_beams(PROMPT[:length] + [number], params, 8)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_prompt_is_computed_once_and_its_beams_share_its_blocks(async_scheduling: bool) -> None:
    prompt = list(range(3, 45))  # 42 tokens, 11 blocks of 4
    driver = BeamDriver(async_scheduling)
    driver.search("s", prompt, ignore_eos=True)
    driver.step()
    most = 0
    while driver.scheduler.has_work:
        driver.step()
        most = max(most, driver.limits.num_kv_blocks - driver.scheduler.blocks.num_free_blocks)
    assert sum(len(row.token_ids) for step in driver.steps for row in step.rows) == len(prompt) + 7 * WIDTH
    assert most <= 10 + WIDTH * 3, "the beams do not share the prompt's ten full blocks"
    scheduled = [token for step in driver.steps for row in step.rows for token in row.token_ids]
    assert PREVIOUS_SAMPLE not in scheduled, "a beam was scheduled ahead"


def test_beams_that_find_no_room_are_preempted_and_computed_again() -> None:
    driver = BeamDriver(num_kv_blocks=8)
    driver.search("s", PROMPT, max_tokens=12, ignore_eos=True)
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    params = BeamSearchParams(WIDTH, 12, ignore_eos=True)
    assert driver.found("s") == expected_beams(PROMPT, params, 12)
    metrics = driver.last["s"].metrics
    assert metrics is not None
    assert metrics["num_preemptions"] == driver.scheduler.num_preemptions


def test_a_resting_beam_gives_way_to_the_sibling_behind_another_request() -> None:
    """The others hold what the head of the queue wants, and wait for a sibling that stands behind it."""
    driver = BeamDriver(num_kv_blocks=8, max_num_seqs=3)
    driver.search("s", PROMPT, max_tokens=6)
    for number in range(6):
        driver.add(f"r{number}", [number + 20] * 10, max_tokens=4)
    driver.search("t", PROMPT[:3], max_tokens=6)
    driver.run()
    assert driver.found("s") == expected_beams(PROMPT, BeamSearchParams(WIDTH, 6), 6)
    assert driver.found("t") == expected_beams(PROMPT[:3], BeamSearchParams(WIDTH, 6), 6)
    assert all(driver.tokens[f"r{number}"] == expected_output([number + 20] * 10, 4) for number in range(6))


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_forked_beams_keep_the_turn_of_their_request(policy: str) -> None:
    driver = BeamDriver(policy=policy)
    driver.search("s", PROMPT, ignore_eos=True)
    driver.now = 1.0
    driver.add("later", [40] * 5)
    for _ in range(4):
        driver.step()
        order = [seq.request.request_id for seq in driver.scheduler.running]
        assert order == ["s"] * (len(order) - 1) + ["later"]
    assert len(order) == WIDTH + 1
    driver.run()


def test_a_beam_that_outgrows_the_cache_ends_the_search_with_what_there_is() -> None:
    driver = BeamDriver(num_kv_blocks=3)
    driver.search("s", PROMPT, max_tokens=20, ignore_eos=True)
    driver.run()
    # Twelve tokens fit, and one more is known that is not computed.
    assert driver.found("s") == expected_beams(PROMPT, BeamSearchParams(WIDTH, 6, ignore_eos=True), 6)


def test_max_tokens_none_goes_up_to_max_model_len() -> None:
    driver = BeamDriver(max_model_len=12)
    driver.search("s", PROMPT, max_tokens=None, ignore_eos=True)
    driver.run()
    assert driver.found("s") == expected_beams(PROMPT, BeamSearchParams(WIDTH, 5, ignore_eos=True), 5)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("num_steps", range(6))
def test_an_abort_frees_every_beam(num_steps: int, async_scheduling: bool) -> None:
    driver = BeamDriver(async_scheduling, num_kv_blocks=9)
    driver.search("s", PROMPT, max_tokens=12, ignore_eos=True)
    driver.add("r", [40] * 5)
    for _ in range(num_steps):
        driver.step()
    driver.abort("s")
    driver.abort("s")
    assert driver.found("s") == [([], "abort")] * WIDTH
    assert driver.scheduler.num_searches == 0
    driver.run()
    assert driver.tokens["r"] == expected_output([40] * 5, 8)


def test_a_search_goes_on_until_no_output_is_wanted() -> None:
    driver = BeamDriver()
    driver.search("s", PROMPT)
    driver.step()
    for index in range(WIDTH - 1):
        driver.abort("s", index=index)
        assert driver.scheduler.requests
    driver.abort("s", index=WIDTH - 1)
    assert not driver.scheduler.requests


def test_a_deadline_ends_every_output_with_an_error() -> None:
    driver = BeamDriver()
    driver.step_seconds = lambda step: 1.0
    driver.search("s", PROMPT, timeout=3.5, ignore_eos=True)
    driver.run()
    assert driver.found("s") == [([], "error")] * WIDTH
    error = driver.last["s"].error
    assert error is not None
    assert error["kind"] == "RequestTimeoutError"


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_new_worker_group_goes_on_with_the_same_beams(async_scheduling: bool) -> None:
    driver = BeamDriver(async_scheduling, num_kv_blocks=9)
    driver.search("s", PROMPT)
    for group in range(2, 8):
        driver.step()
        driver.step()
        driver.new_epoch(Epoch(1, group))
    driver.run()
    assert driver.found("s") == expected_beams(PROMPT, BeamSearchParams(WIDTH, 8), 8)


def test_a_search_that_is_sent_again_is_not_disturbed_and_one_that_is_over_is_made_anew() -> None:
    driver = BeamDriver()
    driver.search("s", PROMPT)
    driver.step()
    driver.step()
    driver.search("s", PROMPT)
    assert len(driver.scheduler.requests) == 1
    driver.run()
    first = driver.found("s")
    driver.finished.clear()
    driver.search("s", PROMPT)
    driver.run()
    assert driver.found("s") == first


def test_log_probabilities_are_those_of_each_outputs_tokens() -> None:
    driver = BeamDriver()
    driver.search("s", PROMPT, logprobs=2)
    driver.run()
    tokens, logprobs = driver.tokens["s"], driver.last["s"].logprobs
    assert logprobs is not None
    for position, (ids, values, rank) in enumerate(logprobs):
        told_ids, told_values, _ = invented_told(PROMPT + tokens[:position], 2 * WIDTH)
        place = told_ids.index(tokens[position], 1)
        assert (ids, values) == ([told_ids[place], *told_ids[1:3]], [told_values[place], *told_values[1:3]])
        assert rank == place


def test_a_search_wider_than_the_vocabulary_allows_is_refused() -> None:
    driver = BeamDriver(vocab_size=50)
    driver.search("s", [3], beam_width=26)
    error = driver.last["s[25]"].error
    assert error is not None
    assert "beam_width must be at most 25 for a vocabulary of 50 tokens, got 26" in error["message"]


@pytest.mark.parametrize("seed", range(12))
def test_searches_among_other_requests_under_churn(seed: int) -> None:
    draw = random.Random(seed)
    driver = BeamDriver(
        draw.random() < 0.6,
        num_kv_blocks=draw.choice([14, 20, 40]),
        block_size=draw.choice([2, 4]),
        max_num_seqs=draw.choice([2, 5, 9]),
        max_num_batched_tokens=draw.choice([2, 9, 64]),
        enable_prefix_caching=draw.random() < 0.6,
        policy=draw.choice(["fcfs", "priority"]),
        preemption_mode=draw.choice(["recompute", "swap"]),
        num_host_blocks=draw.choice([0, 10, 100]),
    )
    wanted: dict[str, Any] = {}
    aborted = set()
    for number in range(14):
        name, prompt = f"q{number}", [draw.choice([3, 4]) for _ in range(draw.choice([1, 5, 8, 12]))]
        if draw.random() < 0.5:
            params = BeamSearchParams(
                draw.choice([1, 2, 4]), draw.choice([1, 5, 9]), early_stopping=draw.random() < 0.5
            )
            driver.search(name, prompt, **params.to_dict())
            assert params.max_tokens is not None
            wanted[name] = expected_beams(prompt, params, params.max_tokens)
        else:
            count = draw.choice([1, 1, 3])
            driver.add(name, prompt, n=count, max_tokens=6)
            wanted[name] = [(expected_output(prompt, 6, index), "length") for index in range(count)]
        for _ in range(draw.randrange(6)):
            driver.step()
        victim = draw.choice(list(wanted))
        if draw.random() < 0.2 and victim not in driver.finished:
            driver.abort(victim)
            aborted.add(victim)
        if draw.random() < 0.1:
            driver.new_epoch(Epoch(1, number + 2))
    driver.run()
    for name in wanted.keys() - aborted:
        assert driver.found(name, len(wanted[name])) == wanted[name], name
