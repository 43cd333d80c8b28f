"""Log-probabilities of a prompt as they travel, and what the scheduler keeps of them; knows no queue and no client.

They are computed chunk by chunk, and what was computed is kept until the sequence ends: a preempted sequence goes on
behind it, and a front end that missed some of it is told again. Packed, a prompt of 4,096 tokens with 20 of the
likeliest each takes 0.7 MB.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from nanoengine.step import TokenLogprobs


class PromptLogprobs(NamedTuple):
    """Log-probabilities of consecutive tokens of a prompt, packed, since nobody on their way looks at a single one.

    Entry k tells of the token at position k + 1, from the logits at position k: the first token has none, so a
    prompt of p tokens has p - 1 entries. The numbers are in the machine's own byte order, which they never leave.

    Attributes:
        start: number of the first entry.
        width: token ids an entry, at least 1.
        token_ids: (num_entries, width) int32: the prompt's own token, then the likeliest in their order.
        values: (num_entries, width) float32, the log-probability of each.
        ranks: (num_entries,) int32, of the prompt's own token; 1 is the likeliest.
    """

    start: int
    width: int
    token_ids: bytes
    values: bytes
    ranks: bytes

    @property
    def end(self) -> int:
        """Number of the entry that follows the last."""
        return self.start + len(self.ranks) // 4

    def since(self, entry: int) -> PromptLogprobs:
        """The entries from number `entry` on."""
        skip = 4 * max(0, entry - self.start)
        first = min(max(entry, self.start), self.end)
        wide = skip * self.width
        return PromptLogprobs(first, self.width, self.token_ids[wide:], self.values[wide:], self.ranks[skip:])

    def joined(self, *later: PromptLogprobs) -> PromptLogprobs:
        """These entries and the ones that follow them."""
        chunks = (self, *later)
        for one, other in itertools.pairwise(chunks):
            assert (one.end, one.width) == (other.start, other.width), "entries that do not follow each other"
        columns = (b"".join(column) for column in zip(*(chunk[2:] for chunk in chunks), strict=True))
        return PromptLogprobs(self.start, self.width, *columns)

    def entries(self) -> Iterator[TokenLogprobs]:
        """One after the other."""
        token_ids, values = array("i", self.token_ids), array("f", self.values)
        for place, rank in enumerate(array("i", self.ranks)):
            part = slice(place * self.width, (place + 1) * self.width)
            yield token_ids[part].tolist(), values[part].tolist(), rank

    @classmethod
    def checked(cls, fields: Any) -> PromptLogprobs:
        """Rebuild from what came over a wire. Raises ValueError or TypeError unless the columns fit together."""
        made = cls(*fields)
        if (
            made.width < 1
            or len(made.ranks) % 4
            or not (len(made.token_ids) == len(made.values) == made.width * len(made.ranks))
        ):
            raise ValueError("columns of prompt log-probabilities do not fit together")
        return made


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
