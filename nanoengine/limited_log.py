"""A warning that whoever can provoke it cannot fill a disk with; knows nothing of what it warns of."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

SECONDS = 1.0


class LimitedLog:
    """Logs the first warning of each second, and with it how many were left out before."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger, self._clock = logger, clock
        self._next, self._left_out = -SECONDS, 0

    def warning(self, text: str) -> None:
        """Log `text`, or count it."""
        now = self._clock()
        if now < self._next:
            self._left_out += 1
            return
        more = f" (and {self._left_out} more since the last such line)" if self._left_out else ""
        self._next, self._left_out = now + SECONDS, 0
        self._logger.warning("%s%s", text, more)
