"""What a step costs, learnt from the steps that were measured; knows no sequence, only how many tokens there were.

The model is a line: a step of decodes alone takes `undisturbed` seconds, and each prefill token beside them adds the
same. That is enough to say how many prefill tokens keep a step within a multiple of the undisturbed time.
"""

from __future__ import annotations

# How much of a new measurement is taken over: what makes a step look dearer at once, good news slowly, so that errors
# are on the side of the streams.
QUICKLY, SLOWLY = 0.5, 0.1
# Prefill tokens in the first step that mixes them with decodes, when nothing is known of their cost.
PROBE_TOKENS = 16
# After so many mixed steps one of decodes alone is wanted, since the undisturbed time may have changed.
MIXED_STEPS = 32


class StepCosts:
    """Bounds the prefill tokens of a step that holds decodes.

    Args:
        max_gap: how many times its undisturbed duration such a step may take; 0 for any.
    """

    def __init__(self, max_gap: float) -> None:
        self._max_gap = max_gap
        self._undisturbed: float | None = None  # seconds
        self._prefill_token: float | None = None  # seconds
        self._mixed_steps = 0  # since the last step of decodes alone
        self._measured = False  # whether steps are measured at all

    def observe(self, num_decodes: int, num_prefill_tokens: int, seconds: float) -> None:
        """Learn from a step that was measured; one without a measurement (0 seconds) teaches nothing."""
        self._measured = seconds > 0
        if not self._measured or not self._max_gap:
            return
        if num_prefill_tokens:
            self._mixed_steps += num_decodes > 0
            cost = max(0.0, seconds - (self._undisturbed or 0.0)) / num_prefill_tokens
            self._prefill_token = _moved(self._prefill_token, cost, QUICKLY, SLOWLY)
        elif num_decodes:
            self._mixed_steps = 0
            self._undisturbed = _moved(self._undisturbed, seconds, SLOWLY, QUICKLY)

    def max_prefill_tokens(self) -> int | None:
        """How many prefill tokens may stand beside decodes in the next step; None for any number.

        0 asks for a step of decodes alone, to measure one. Otherwise it is at least 1: prompts always progress.
        """
        if not self._max_gap or not self._measured:
            return None
        if self._undisturbed is None or self._mixed_steps >= MIXED_STEPS:
            return 0
        if not self._prefill_token:
            return PROBE_TOKENS
        return max(1, int((self._max_gap - 1) * self._undisturbed / self._prefill_token))


def _moved(known: float | None, seen: float, up: float, down: float) -> float:
    """The running mean after another measurement."""
    if known is None:
        return seen
    return known + (up if seen > known else down) * (seen - known)
