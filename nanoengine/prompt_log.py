"""What the scheduler keeps of a prompt's log-probabilities; knows no queue and no client.

They are computed chunk by chunk, and what was computed is kept until the sequence ends: a preempted sequence goes on
behind it, and a front end that missed some of it is told again. Packed, a prompt of 4,096 tokens with 20 of the
likeliest each takes 0.7 MB.
"""

from __future__ import annotations

from nanoengine.step import PromptLogprobs


class PromptLog:
    """Entries from number `first` on, in order and without gaps; the ones before it are with the front end.

    Args:
        first: number of the first entry that is kept here.
        total: how many entries the prompt has, one for each of its tokens but the first.
    """

    __slots__ = ("_chunks", "end", "total")

    def __init__(self, first: int, total: int) -> None:
        self.total = total
        self.end = min(first, total)
        self._chunks: list[PromptLogprobs] = []

    @property
    def is_complete(self) -> bool:
        """Whether no entry will follow."""
        return self.end >= self.total

    def add(self, chunk: PromptLogprobs) -> PromptLogprobs | None:
        """Keep the entries of `chunk` that are new, and return them; None when there are none."""
        assert chunk.start <= self.end, f"prompt log-probabilities skip from entry {self.end} to {chunk.start}"
        new = chunk.since(self.end)
        if new.end <= self.end:
            return None
        assert new.end <= self.total, f"prompt log-probabilities go on to entry {new.end} of {self.total}"
        self._chunks.append(new)
        self.end = new.end
        return new

    def since(self, entry: int) -> PromptLogprobs | None:
        """What is kept of the entries from number `entry` on, as one chunk; None when it is nothing."""
        found = [chunk.since(entry) for chunk in self._chunks if chunk.end > entry]
        return found[0].joined(*found[1:]) if found else None
