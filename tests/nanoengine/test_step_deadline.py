"""How long a step may take, learnt from those before it."""

from __future__ import annotations

import pytest

from nanoengine.step_deadline import ENOUGH, FLOOR_SECONDS, StepDeadline


def test_nothing_is_concluded_from_few_steps_or_from_those_of_another_kind() -> None:
    deadline = StepDeadline(60)
    for _ in range(ENOUGH - 1):
        deadline.observe(0, 0.01)
    assert deadline.limit(0) == 60
    deadline.observe(0, 0.01)
    assert deadline.limit(0) == FLOOR_SECONDS
    assert deadline.limit(1) == 60


def test_slow_steps_get_ten_times_their_99th_percentile_and_prompts_by_the_token() -> None:
    deadline = StepDeadline(60)
    for number in range(200):
        deadline.observe(0, 0.5 if number else 30.0)  # one outlier is not the rule
        deadline.observe(100, 0.2)
    assert deadline.limit(0) == pytest.approx(5.0)
    assert deadline.limit(100) == FLOOR_SECONDS
    assert deadline.limit(1000) == pytest.approx(20.0)
    assert deadline.limit(100_000) == 60, "step_timeout bounds them all"


def test_a_step_timeout_below_the_floor_is_what_the_user_wants() -> None:
    deadline = StepDeadline(0.5)
    for _ in range(ENOUGH):
        deadline.observe(0, 0.2)
    assert deadline.limit(0) == 0.5
