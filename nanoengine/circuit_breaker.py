"""How often something that fails is started again, and how long after: ranks, or the scheduler. It knows neither."""

from __future__ import annotations

import collections
from collections.abc import Callable

# Pauses before the starts that follow one which failed, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 5.0


def pause_before(num_failed_starts: int) -> float:
    """Seconds to wait before a start that follows so many failed ones: what they lacked may come back late."""
    return min(FIRST_PAUSE * 2 ** (num_failed_starts - 1), LONGEST_PAUSE) if num_failed_starts else 0.0


class CircuitBreaker:
    """Opens when restarts follow each other without bringing a step; `max_restarts` of them within `window` seconds."""

    def __init__(self, max_restarts: int, window: float, clock: Callable[[], float]) -> None:
        self._max_restarts, self._window, self._clock = max_restarts, window, clock
        self._futile: collections.deque[float] = collections.deque()

    def allows(self, *, futile: bool) -> bool:
        """Whether what failed may be started again; `futile` says that it has not brought a single step."""
        if futile and self._max_restarts:
            now = self._clock()
            while self._futile and self._futile[0] < now - self._window:
                self._futile.popleft()
            if len(self._futile) < self._max_restarts:
                self._futile.append(now)
                return True
        return not futile and self._max_restarts > 0

    def reset(self) -> None:
        """Forget the restarts: their cause was found."""
        self._futile.clear()
