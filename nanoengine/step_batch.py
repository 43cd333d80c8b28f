"""The rows of one step while the scheduler puts it together; knows no queue and no block."""

from __future__ import annotations

from nanoengine.sequence import Sequence


class StepBatch:
    """The rows of the step that is being put together, in batch order, under its token budget.

    Attributes:
        budget: tokens that may still be added.
        rows: how many tokens of each sequence are computed.
        preempted: somebody had to give way, so nobody is admitted.
        bounded: `budget` is what max_decode_gap leaves.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.preempted = False
        self.bounded = False
        self.rows: dict[Sequence, int] = {}

    def add(self, seq: Sequence, num_tokens: int) -> None:
        """Compute so many tokens of `seq`."""
        self.rows[seq] = num_tokens
        self.budget -= num_tokens

    def remove(self, seq: Sequence) -> None:
        """Compute nothing of `seq` after all. Harmless for one that is not in."""
        self.budget += self.rows.pop(seq, 0)
