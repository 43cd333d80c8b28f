"""What follows when the ranks give up a step, and when the scheduler itself raises. Without a process."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from configs.errors import StepError
from nanoengine.messages import AddRequest, Resubmit, Stats, decode, spelt_out
from nanoengine.recovery import Recovery
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler import SchedulerLimits
from nanoengine.step_cap import QUIET_STEPS, StepCap
from tests.nanoengine.scheduler_driver import Driver, expected_output
from tests.nanoengine.test_engine_core import FrontEnd, Served, served, settings
from tests.nanoengine.test_engine_recovery import greet, until_end, until_told
from tests.waiting import PATIENCE, until

__all__ = ["served", "settings"]  # fixtures


def ends_of(front: FrontEnd, number: int) -> tuple[dict[str, list[int]], dict[str, Any]]:
    """Tokens and last delta of so many requests."""
    tokens: dict[str, list[int]] = {}
    ends: dict[str, Any] = {}
    while len(ends) < number:
        for delta in spelt_out(getattr(front.receive(), "deltas", [])):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason:
                ends[delta.request_id] = delta
    return tokens, ends


# -- no memory for a step


def test_steps_become_so_small_that_there_is_memory_for_them_and_no_group_is_replaced(served: Served) -> None:
    served.executor.memory, served.executor.held_at = 60, 0
    front = served.front_end()
    for number in range(20):
        front.add(str(number), [number + 1] * 50, max_tokens=40)
    until(lambda: len(served.core.scheduler.requests) == 20)
    served.executor.held_at = None
    tokens, ends = ends_of(front, 20)
    for number in range(20):
        assert tokens[str(number)] == expected_output([number + 1] * 50, 40)
        assert ends[str(number)].finish_reason == "length"
    assert served.executor.steps_given_up[0] > 60
    assert served.executor.epochs == [], "started by the fixture, and never again"
    stats = served.core.recovery.stats
    assert stats.steps_given_up == len(served.executor.steps_given_up)
    assert stats.restarts == Counter()
    assert stats.requests_condemned == 0


def test_whose_steps_never_find_memory_ends_with_an_error_that_says_so(served: Served) -> None:
    served.executor.hungry = 777
    front = served.front_end()
    for number in range(8):
        front.add(str(number), [number + 1, 8], max_tokens=40)
    front.add("hungry", [3, 777], max_tokens=40)
    tokens, ends = ends_of(front, 9)
    assert ends["hungry"].error["kind"] == "EngineError"
    assert "given up: the ranks failed 4 times" in ends["hungry"].error["message"]
    assert "found no memory for step" in ends["hungry"].error["message"]
    for number in range(8):
        assert tokens[str(number)] == expected_output([number + 1, 8], 40)
    assert len(served.executor.steps_given_up) == 4
    assert served.executor.epochs == []


def limits(**given: Any) -> SchedulerLimits:
    fields = {
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "max_model_len": 256,
        "num_kv_blocks": 64,
        "block_size": 4,
    }
    return SchedulerLimits(**(fields | given))


def test_the_limits_halve_and_come_back() -> None:
    full = limits()
    cap = StepCap(full)
    tight = cap.shrink(full, 40, 6)
    assert (tight.max_num_batched_tokens, tight.max_num_seqs) == (20, 3)
    assert cap.is_tight
    tight = cap.shrink(tight, 3, 3)
    assert (tight.max_num_batched_tokens, tight.max_num_seqs) == (1, 1)
    assert cap.shrink(tight, 1, 1) == tight, "there is no less than one"
    seen = {1}
    for _ in range(20 * QUIET_STEPS):
        tight = cap.relax(tight)
        assert tight.max_num_batched_tokens >= tight.max_num_seqs, "steady decodes need a token each"
        seen.add(tight.max_num_batched_tokens)
        if not cap.is_tight:
            break
    assert tight == full
    assert sorted(seen) == [1, 2, 4, 8, 16, 32, 64]


def test_prompts_that_must_be_whole_are_not_cut_and_few_tokens_for_many_sequences_stay_few() -> None:
    whole = limits(enable_chunked_prefill=False)
    assert StepCap(whole).shrink(whole, 64, 2).max_num_batched_tokens == 64
    narrow = limits(max_num_batched_tokens=4)
    assert StepCap(narrow).shrink(narrow, 4, 4).max_num_batched_tokens == 2


@pytest.mark.parametrize("preemption_mode", ["recompute", "swap"])
def test_any_step_may_be_given_up_whatever_is_in_flight(preemption_mode: str) -> None:
    for given_up in range(1, 40, 3):
        driver = Driver(True, num_kv_blocks=20, num_host_blocks=12, preemption_mode=preemption_mode)
        recovery = Recovery(driver.scheduler, 5, 60)
        for number in range(6):
            driver.add(
                str(number), [number % 2, *range(9 + number)], max_tokens=12, n=1 + (number == 3), temperature=1.0
            )
        for number in range(400):
            if number == given_up and driver.scheduler.in_flight:
                oldest = driver.scheduler.in_flight[0].step_id
                recovery.step_given_up(StepError("no memory", 0, oldest))
                driver.outputs.clear()
                driver.workers.lose_everything()
                driver.scheduler.check_invariants()
            driver.step()
            recovery.review()
        driver.run()
        for number in range(6):
            assert driver.tokens[str(number)] == expected_output([number % 2, *range(9 + number)], 12)


# -- the scheduler raises


def break_once(served: Served, name: str, times: int = 1) -> None:
    """Let a method of the scheduler raise in the middle of whatever it does."""
    kind = type(served.core.scheduler)
    original, left = getattr(kind, name), [times]

    def breaking(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        if left[0]:
            left[0] -= 1
            raise KeyError("a bug")
        return result

    served.core.scheduler.__class__ = type("Breaking", (kind,), {name: breaking})


def resubmit(front: FrontEnd, request_id: str, prompt: list[int], tokens: list[int], max_tokens: int) -> None:
    sampling = SamplingParams(temperature=0, max_tokens=max_tokens).to_dict()
    front.send(AddRequest(front.client_id, request_id, prompt, sampling, 0, 0.0, 0, [tokens]))


@pytest.fixture
def faulty(served: Served) -> Any:
    yield served
    served.core.recovery.stats.scheduler_faults = 0  # the fixture is content with those that are looked at here


@pytest.mark.parametrize("name", ["schedule", "commit"])
def test_it_is_replaced_and_the_front_ends_hand_their_requests_in_again(faulty: Served, name: str) -> None:
    front = faulty.front_end()
    greet(front)
    old = faulty.core.scheduler
    break_once(faulty, name)
    front.add("a", [5, 6, 7], max_tokens=30)
    _, before = until_told(front, Resubmit)
    tokens = [token for each in before for delta in spelt_out(getattr(each, "deltas", [])) for token in delta.token_ids]
    resubmit(front, "a", [5, 6, 7], tokens, 30)
    rest, _ = until_end(front, "a")
    assert tokens + rest == expected_output([5, 6, 7], 30)
    assert faulty.core.scheduler is not old
    assert faulty.core.scheduler.totals is old.totals
    assert faulty.core.recovery.stats.scheduler_faults == 1
    assert faulty.executor.epochs == [], "and the ranks stay"


def test_a_request_that_cannot_be_added_fails_alone(faulty: Served) -> None:
    front = faulty.front_end()
    greet(front)
    faulty.executor.held_at = 20
    front.add("open", [8, 9], max_tokens=400)
    front.receive()
    break_once(faulty, "add")
    front.add("bad", [5, 6, 7], max_tokens=30)
    _, delta = until_end(front, "bad")
    assert delta.error == {"kind": "EngineError", "message": "the scheduler failed: KeyError: 'a bug'"}
    until_told(front, Resubmit)
    faulty.executor.held_at = None
    resubmit(front, "open", [8, 9], [], 400)
    tokens, _ = until_end(front, "open")
    assert tokens[-20:] == expected_output([8, 9], 400)[-20:]


def test_a_fault_that_comes_again_and_again_is_left_to_another_process(faulty: Served) -> None:
    front = faulty.front_end()
    greet(front)
    break_once(faulty, "schedule", times=10**9)
    faulty.thread.join(PATIENCE)
    assert isinstance(faulty.error, KeyError)
    told = [front.receive() for _ in range(faulty.core.config.parallel.max_restarts)]
    assert all(isinstance(each, Resubmit) for each in told)
    while front.socket.poll(50):
        assert isinstance(decode(front.socket.recv()), Stats), "it is not told that all is over"
    assert faulty.core.recovery.stats.scheduler_faults == faulty.core.config.parallel.max_restarts
