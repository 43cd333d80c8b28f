"""How large steps may be after one that found no memory: half of it, and more again as steps succeed; knows no row."""

from __future__ import annotations

import dataclasses

from nanoengine.admission import SchedulerLimits

# After so many steps without a failure the next ones may be twice as large.
QUIET_STEPS = 32


class StepCap:
    """Narrows the limits of a scheduler below what the settings say, `is_tight` while it does.

    Sequences that decode together need a token each, so where the settings leave one for each of them, so does this.
    """

    def __init__(self, limits: SchedulerLimits) -> None:
        self.is_tight = False
        self._most_tokens, self._most_seqs = limits.max_num_batched_tokens, limits.max_num_seqs
        self._num_quiet = 0

    def shrink(self, limits: SchedulerLimits, num_tokens: int, num_rows: int) -> SchedulerLimits:
        """The limits after a step of so many tokens and rows failed. Prompts that must be whole stay whole."""
        seqs = max(1, min(limits.max_num_seqs, num_rows) // 2)
        tokens = max(1, min(limits.max_num_batched_tokens, num_tokens) // 2)
        if self._most_tokens >= self._most_seqs:
            tokens = max(tokens, seqs)
        if not limits.enable_chunked_prefill:
            tokens = self._most_tokens
        return self._narrow(limits, tokens, seqs)

    def relax(self, limits: SchedulerLimits) -> SchedulerLimits:
        """The limits after a step that succeeded."""
        self._num_quiet += 1
        if self._num_quiet < QUIET_STEPS:
            return limits
        return self._narrow(limits, 2 * limits.max_num_batched_tokens, 2 * limits.max_num_seqs)

    def _narrow(self, limits: SchedulerLimits, tokens: int, seqs: int) -> SchedulerLimits:
        tokens, seqs = min(tokens, self._most_tokens), min(seqs, self._most_seqs)
        self.is_tight = (tokens, seqs) != (self._most_tokens, self._most_seqs)
        self._num_quiet = 0
        return dataclasses.replace(limits, max_num_batched_tokens=tokens, max_num_seqs=seqs)
