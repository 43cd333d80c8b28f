"""That the idle time of `step_clock.py` is the device's: a host that keeps ahead of it, and one that does not."""

from __future__ import annotations

import time

import pytest
import torch

from tests.gpu.step_clock import StepClock, StepTimes
from tests.gpu.test_run import PROMPT, decode_step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("pause", "least", "most"), [(0.0, 0.0, 0.15), (0.01, 0.5, 1.0)])
def test_idle_time_of_a_device(pause: float, least: float, most: float) -> None:
    """Products of about two milliseconds; a pause of the host is made in the middle of a step, where marks hide it."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    times = StepTimes(StepClock(a.device))
    ends: list[torch.cuda.Event] = []
    for step in [PROMPT, *map(decode_step, range(100))] * 2:
        if len(ends) > 1:
            ends[-2].synchronize()  # as an engine does, which waits for what was sampled
        with times.around(step):
            for _ in range(4):
                a @ a
            time.sleep(pause)
            for _ in range(4):
                a @ a
        ends.append(torch.cuda.Event())
        ends[-1].record()
    found = times.summary()["2"]
    assert least <= found["idle"] <= most, found
