"""How long a step may take before its ranks count as hung, learnt from the steps before it; knows no process.

A step may take ten times what steps of its kind took at the 99th percentile, and never less than five seconds. Of
what has not been seen yet nothing is concluded: the setting `step_timeout`, which bounds all others too, applies.
"""

from __future__ import annotations

import collections
import math

FLOOR_SECONDS = 5.0
FACTOR = 10.0
# So many recent steps of a kind are remembered, and so many are needed before anything is concluded from them.
WINDOW = 512
ENOUGH = 16


class StepDeadline:
    """The times of recent steps by kind: decodes alone, and, for each prompt token, those that have prompt tokens."""

    def __init__(self, step_timeout: float) -> None:
        """`step_timeout` in seconds is the longest deadline there is."""
        self._step_timeout = step_timeout
        self._decode: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._per_token: collections.deque[float] = collections.deque(maxlen=WINDOW)

    def observe(self, num_prompt_tokens: int, seconds: float) -> None:
        """A step with so many prompt tokens (0: decodes alone) took `seconds`."""
        if num_prompt_tokens:
            self._per_token.append(seconds / num_prompt_tokens)
        else:
            self._decode.append(seconds)

    def limit(self, num_prompt_tokens: int) -> float:
        """Seconds within which a step with so many prompt tokens must return."""
        times = self._per_token if num_prompt_tokens else self._decode
        if len(times) < ENOUGH:
            return self._step_timeout
        expected = _percentile99(times) * max(1, num_prompt_tokens)
        return min(self._step_timeout, max(FLOOR_SECONDS, FACTOR * expected))


def _percentile99(times: collections.deque[float]) -> float:
    ordered = sorted(times)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]
