"""How long steady decode steps take, what of it the device computes, and so how long it idles, in the real processes.

The device's part of a step cannot be read off a step as it runs: between two marks on a stream the device may wait for
the host as well. So the same decoding is done twice. The first time nothing is disturbed, and what lies between the
ends of two steps is a `step`. The second time the device is held before some steps until the host has launched all of
it, and marks on both sides then enclose nothing but computing: `busy`. The device idles for what is left: 1 - busy /
step. No profiler slows anything down. Holds and undisturbed steps do not mix, since a host that was given a start keeps
it for long where it is hardly slower than the device.

Three parts: `StepClock`, the marks on a device; `TimedRunner`, a ModelRunner that sets them; and the way into an
engine's processes: `timed` makes engines of this program run `main` as their scheduler, whose ranks run `run_worker`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nanoengine.channel import RankPort
from nanoengine.step import StepInput
from workers import worker
from workers.launched_step import LaunchedStep
from workers.model_runner import ModelRunner

VARIABLE = "NANOENGINE_STEP_TIMES"
"""Names the file that rank 0 writes."""

HOLD_EVERY = 16
_LEAST_RUN = 40
"""Steps without a break that count as decoding which was done once."""
_BEFORE_STEADY = 4
"""The first steps behind a break, of which the host may have been given a start."""
_FIRST_HOLD_CYCLES, _MOST_CYCLES = 20_000_000, 400_000_000  # 10 ms, 0.2 s


class StepClock:
    """Marks on the current stream of a device; on a CPU, moments."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._cycles = _FIRST_HOLD_CYCLES

    def hold(self) -> None:
        """Keep the device from what is launched next, for a while."""
        if self._on_gpu:
            torch.cuda._sleep(self._cycles)

    def hold_longer(self) -> None:
        """The host was not done in time."""
        self._cycles = min(2 * self._cycles, _MOST_CYCLES)

    def mark(self) -> Any:
        """Something for `seconds`."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def is_past(self, mark: Any) -> bool:
        """Whether the device has come to a mark."""
        return bool(mark.query()) if self._on_gpu else False

    def seconds(self, first: Any, second: Any) -> float:
        """Between two marks; waits for them."""
        if not self._on_gpu:
            return float(second - first)
        second.synchronize()
        return float(first.elapsed_time(second)) / 1e3


@dataclasses.dataclass(slots=True)
class _Step:
    num_rows: int
    begin: Any
    end: Any
    held: bool
    undisturbed: bool


class StepTimes:
    """What was marked of decode steps that only go on with the rows of the step before.

    Attributes:
        holds: whether the device is held before some; turns around after each long run of such steps.
    """

    def __init__(self, clock: StepClock, holds: bool = False) -> None:
        self._clock, self.holds = clock, holds
        self._steps: list[list[_Step]] = [[]]  # runs of steps without a break

    @contextlib.contextmanager
    def around(self, step: StepInput) -> Iterator[None]:
        """Mark a step on both sides, and hold the device before some."""
        num_rows = len(step.decodes)
        if not num_rows or step.states or step.finished or step.copies:
            if len(self._steps[-1]) >= _LEAST_RUN:
                self.holds = not self.holds
            self._steps.append([])
            yield
            return
        run = self._steps[-1]
        held = self.holds and len(run) % HOLD_EVERY == HOLD_EVERY - 1
        if held:
            self._clock.hold()
        begin = self._clock.mark()
        yield
        ahead = not self._clock.is_past(begin)  # the host has launched the whole step
        if held and not ahead:
            self._clock.hold_longer()
        end = self._clock.mark()
        run.append(_Step(num_rows, begin, end, held and ahead, not self.holds and len(run) >= _BEFORE_STEADY))

    def summary(self) -> dict[str, dict[str, float]]:
        """By the number of rows: medians in seconds of `step` and `busy`, how many of each, and `idle`, a share."""
        steps: dict[int, list[float]] = {}
        busy: dict[int, list[float]] = {}
        for run in self._steps:
            for before, after in itertools.pairwise(run):
                if after.held:
                    busy.setdefault(after.num_rows, []).append(self._clock.seconds(after.begin, after.end))
                elif before.undisturbed and after.undisturbed:
                    steps.setdefault(after.num_rows, []).append(self._clock.seconds(before.end, after.end))
        return {
            str(rows): {
                "step": statistics.median(steps[rows]),
                "busy": statistics.median(busy[rows]),
                "steps": len(steps[rows]),
                "held": len(busy[rows]),
                "idle": max(0.0, 1 - statistics.median(busy[rows]) / statistics.median(steps[rows])),
            }
            for rows in sorted(steps.keys() & busy.keys())
        }


class TimedRunner(ModelRunner):
    """A ModelRunner that marks its steps."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.times = StepTimes(StepClock(self._device))

    def launch(self, step: StepInput) -> LaunchedStep:
        """See `ModelRunner.launch`."""
        with self.times.around(step):
            return super().launch(step)


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process: the usual one, with a `TimedRunner`."""
    runners: list[TimedRunner] = []

    def make(*args: Any) -> TimedRunner:
        runners.append(TimedRunner(*args))
        return runners[-1]

    with mock.patch.object(worker, "ModelRunner", make):
        worker.run_worker(port)
    if port.rank == 0:
        Path(os.environ[VARIABLE]).write_text(json.dumps(runners[-1].times.summary()), encoding="utf-8")


@contextlib.contextmanager
def timed(file: Path) -> Iterator[None]:
    """Engines that are started inside write their step times to `file` when they end."""
    from nanoengine import llm_engine
    from nanoengine.scheduler_keeper import SchedulerKeeper

    with (
        mock.patch.dict(os.environ, {VARIABLE: str(file)}),
        mock.patch.object(llm_engine, "SchedulerKeeper", lambda config: SchedulerKeeper(config, __name__)),
    ):
        yield


def main() -> None:
    """The scheduler's process, whose ranks are timed."""
    from nanoengine import engine
    from nanoengine.executor import MultiprocessExecutor

    def create(config: Any, run_dir: Path) -> MultiprocessExecutor:
        return MultiprocessExecutor(config, run_dir, "tests.gpu.step_clock:run_worker")

    with mock.patch.object(engine, "create_executor", create):
        engine.main()


if __name__ == "__main__":
    main()
