"""What a server's processes hold over time: memory, descriptors, threads; and whether it grows. Knows no request."""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from launch.bench import processes

# What may be added to a quantity over a run, whatever it was: caches fill, pools start threads when they need them.
_ALLOWED = {"memory": 24 * 2**20, "descriptors": 12, "threads": 8}
_ALLOWED_SHARE = 0.10
# Of a run, at its beginning: caches, pools and allocators fill.
_WARM_UP_SHARE = 0.25
FRONT_END, FRONT_ENDS = "front end", "front ends"
_ROLES = {
    "nano-front": FRONT_ENDS,
    "nano-scheduler": "scheduler",
    "nano-worker": "ranks",
    "nano-spare": "spare ranks",
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the processes held at one moment, `seconds` after the run began, by role.

    Which they are, their PSS and their own memory (what of it belongs to no file) in bytes, descriptors and threads.
    Descriptors that are connections to our clients are not counted.
    """

    seconds: float
    pids: dict[str, list[int]]
    pss: dict[str, int]
    memory: dict[str, int]
    descriptors: dict[str, int]
    threads: dict[str, int]

    @classmethod
    def take(cls, root: int, since: float, num_connections: int) -> Sample:
        """Look now; `since` is when the run began, by `time.monotonic`."""
        roles: dict[str, list[int]] = {}
        for pid in processes.tree(root):
            role = FRONT_END if pid == root else _role(processes.name(pid))
            roles.setdefault(role, []).append(pid)

        serving = FRONT_ENDS if FRONT_ENDS in roles else FRONT_END  # of several, the first process serves nobody
        connections = {serving: num_connections}

        def by_role(measure: Callable[[list[int]], int]) -> dict[str, int]:
            return {role: measure(roles[role]) for role in sorted(roles)}

        return cls(
            round(time.monotonic() - since, 2),
            {role: sorted(roles[role]) for role in sorted(roles)},
            by_role(processes.proportional_memory),
            by_role(processes.own_memory),
            {role: number - connections.get(role, 0) for role, number in by_role(processes.num_descriptors).items()},
            by_role(processes.num_threads),
        )


def _role(name: str) -> str:
    return next((role for prefix, role in _ROLES.items() if name.startswith(prefix)), "other")


class Watch:
    """Samples of one tree of processes, taken beside everything else.

    Args:
        root: the first of them.
        every: seconds between two samples.
        num_connections: tells how many connections our clients hold.
    """

    def __init__(self, root: int, every: float, num_connections: Callable[[], int]) -> None:
        self.samples: list[Sample] = []
        self._root, self._every, self._since = root, every, time.monotonic()
        self._num_connections = num_connections

    async def look(self) -> Sample:
        """Take a sample now."""
        sample = await asyncio.to_thread(Sample.take, self._root, self._since, self._num_connections())
        self.samples.append(sample)
        return sample

    async def look_on(self) -> None:
        """Take one every so often, until cancelled."""
        while True:
            await asyncio.sleep(self._every)
            await self.look()


@dataclasses.dataclass(frozen=True)
class Trend:
    """How a quantity of a role went over a run: its median, its slope a minute, and what that makes over the whole.

    `allowed` is how much it may grow; None where that is not judged.
    """

    median: float
    per_minute: float
    growth: float
    allowed: float | None

    @property
    def is_flat(self) -> bool:
        """Whether it grew by no more than is allowed."""
        return self.allowed is None or self.growth <= self.allowed

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        rounded = {name: None if value is None else round(value, 2) for name, value in vars(self).items()}
        return rounded | {"flat": self.is_flat}


def trends(samples: Sequence[Sample]) -> dict[str, dict[str, Trend]]:
    """The trend of each quantity, by role; empty where there are too few samples.

    The slope is the median of those between any two samples (Theil and Sen), which no single peak moves. Samples with
    fewer processes of a role than usual are left out: a group is starting. What a role's processes hold depends on
    their age, and a killed one begins anew, so the memory of roles that were replaced is not judged.
    """
    begin = samples[-1].seconds * _WARM_UP_SHARE if samples else 0.0
    late = [sample for sample in samples if sample.seconds >= begin]
    found: dict[str, dict[str, Trend]] = {}
    for role in dict.fromkeys(role for sample in late for role in sample.pids):
        usual = statistics.mode(len(sample.pids.get(role, ())) for sample in late)
        settled = [sample for sample in late if len(sample.pids.get(role, ())) == usual > 0]
        if len(settled) < 4:
            continue
        was_replaced = len({tuple(sample.pids[role]) for sample in settled}) > 1
        found[role] = {
            name: _trend(settled, role, name, judged=not (was_replaced and name == "memory")) for name in _ALLOWED
        }
    return found


def _trend(samples: Sequence[Sample], role: str, name: str, judged: bool) -> Trend:
    points = [(sample.seconds, float(getattr(sample, name)[role])) for sample in samples]
    slopes = [
        (later - earlier) / (end - begin)
        for number, (begin, earlier) in enumerate(points)
        for end, later in points[number + 1 :]
        if end > begin
    ]
    slope = statistics.median(slopes)
    median = statistics.median(value for _, value in points)
    allowed = max(_ALLOWED[name], _ALLOWED_SHARE * median) if judged else None
    return Trend(median, 60 * slope, slope * (points[-1][0] - points[0][0]), allowed)
