"""What a front end knows of the engine for somebody who watches: the latest state, and how long requests took lately.

It is handed what arrives and what ends; it asks nobody and knows neither sockets nor HTTP.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable

from nanoengine.journal import RequestJournal
from nanoengine.messages import EngineState
from nanoengine.outputs import RequestMetrics

# Latencies are those of requests that ended within so many seconds, this many at most, and of those still open.
RECENT_SECONDS = 60.0
MAX_RECENT = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Percentiles:
    """Of so many values, in seconds; None where there are none."""

    count: int
    p50: float | None
    p90: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Nearest-rank percentiles: each is one of the values."""
        ranked = sorted(values)
        if not ranked:
            return cls(0, None, None)
        return cls(len(ranked), *(ranked[math.ceil(share * len(ranked)) - 1] for share in (0.5, 0.9)))


@dataclasses.dataclass(frozen=True, slots=True)
class Latencies:
    """Time to first token and time per output token of this front end's recent requests."""

    ttft: Percentiles
    tpot: Percentiles


@dataclasses.dataclass(frozen=True, slots=True)
class EngineView:
    """The scheduler's state and this front end's latencies."""

    state: EngineState
    latencies: Latencies


class Observer:
    """Keeps the latest `state`, and the times of requests that ended."""

    def __init__(self, still_open: Collection[RequestJournal], clock: Callable[[], float] = time.time) -> None:
        """`still_open` always holds the requests that have not ended."""
        self.state: EngineState | None = None
        self._still_open = still_open
        self._clock = clock
        self._ended: deque[RequestMetrics] = deque(maxlen=MAX_RECENT)

    def ended(self, journal: RequestJournal) -> None:
        """A request has ended, in whichever way."""
        self._ended.append(journal.measured())

    def latencies(self) -> Latencies:
        """Of the requests that ended lately and of those that are open and have tokens."""
        horizon = self._clock() - RECENT_SECONDS
        recent = [each for each in self._ended if (each.finished_time or 0.0) >= horizon]
        recent.extend(journal.measured() for journal in self._still_open)
        return Latencies(
            Percentiles.of(each.ttft for each in recent if each.ttft is not None),
            Percentiles.of(each.tpot for each in recent if each.tpot is not None),
        )
