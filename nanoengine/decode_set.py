"""The steady decodes: running sequences that take one token further in every step, all together, kept as columns.

What most sequences do most of the time costs nothing for each of them here. All members take the same steps, so one
clock (`age`) tells how far every one of them is: a member's `num_computed_tokens` is what it was less the age at which
it joined, plus the age now. Two members that are as far from the next block boundary stay so, and the age at which a
member's length is reached is known when it joins. This module knows no queue, no budget and no block's number.

Whoever changes a member in any other way than by such a step (preempts, forks or ends it) makes it leave first. Outside
the set a decode is scheduled as any other row, which is slower and does the same.
"""

from __future__ import annotations

import bisect
import dataclasses
from array import array
from collections import defaultdict
from typing import Any, TypeVar

from nanoengine.admission import ServingOrder
from nanoengine.sequence import ScheduledRow, Sequence
from nanoengine.step import PREVIOUS_SAMPLE, DecodeRows, IntColumn, StepOutput, int_column

Column = TypeVar("Column", bound="Any")


@dataclasses.dataclass(slots=True)
class SteadyRows:
    """Columns, one entry a member, in serving order.

    Attributes:
        token_ids: the members' own lists.
        request_ids, indices, client_ids: what their clients know them by.
        seq_ids: of each.
        starts: num_computed_tokens less the age.
        offsets: position of the next token in the output, less the age of the step that samples it.
        lives: num_preemptions.
        watched: whether what it samples must be looked at one by one.
    """

    seqs: list[Sequence] = dataclasses.field(default_factory=list)
    token_ids: list[list[int]] = dataclasses.field(default_factory=list)
    request_ids: list[str] = dataclasses.field(default_factory=list)
    indices: list[int] = dataclasses.field(default_factory=list)
    client_ids: list[str] = dataclasses.field(default_factory=list)
    seq_ids: IntColumn = dataclasses.field(default_factory=lambda: array("i"))
    starts: IntColumn = dataclasses.field(default_factory=lambda: array("i"))
    offsets: list[int] = dataclasses.field(default_factory=list)
    lives: list[int] = dataclasses.field(default_factory=list)
    watched: bytearray = dataclasses.field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.seqs)

    def insert(self, at: int, seq: Sequence, start: int) -> None:
        """Make room for one more at row `at`."""
        self.seqs.insert(at, seq)
        self.token_ids.insert(at, seq.token_ids)
        self.request_ids.insert(at, seq.request.request_id)
        self.indices.insert(at, seq.index)
        self.client_ids.insert(at, seq.request.client_id)
        self.seq_ids = _inserted(self.seq_ids, at, seq.seq_id)
        self.starts = _inserted(self.starts, at, start)
        self.offsets.insert(at, start + 1 - seq.num_prompt_tokens)
        self.lives.insert(at, seq.num_preemptions)
        self.watched.insert(at, seq.logprobs is not None or bool(seq.request.sampling_params.stop_token_ids))

    def remove(self, at: int) -> None:
        """Take row `at` out."""
        for name in _COLUMNS:
            del getattr(self, name)[at]

    def copy(self) -> SteadyRows:
        """Columns of one's own."""
        return SteadyRows(*(getattr(self, name)[:] for name in _COLUMNS))

    def without(self, rows: list[int]) -> SteadyRows:
        """Columns less these rows, which are in ascending order."""
        return SteadyRows(*(without(getattr(self, name), rows) for name in _COLUMNS))


_COLUMNS = tuple(field.name for field in dataclasses.fields(SteadyRows))


def without(column: Column, rows: list[int]) -> Column:
    """A copy of a list, array or bytearray less these rows, which are in ascending order."""
    column = column[:]
    for row in reversed(rows):
        del column[row]
    return column


def _inserted(column: IntColumn, at: int, number: int) -> IntColumn:
    try:
        column.insert(at, number)
    except OverflowError:
        column = array("q", column)
        column.insert(at, number)
    return column


@dataclasses.dataclass(slots=True)
class StepInFlight:
    """What a step that was scheduled and not committed computes: the steady decodes first, then the other rows.

    `age` and `num_left` are the set's before the step.
    """

    step_id: int
    age: int
    num_left: int
    steady: SteadyRows = dataclasses.field(default_factory=SteadyRows)
    records: list[ScheduledRow] = dataclasses.field(default_factory=list)

    def record(self, row: int) -> ScheduledRow:
        """Any row of the step, a steady decode like the others."""
        rows = self.steady
        if row >= len(rows):
            return self.records[row - len(rows)]
        return ScheduledRow(rows.seqs[row], rows.starts[row] + self.age, 1, True, rows.lives[row])

    def seq_of(self, row: int) -> Sequence:
        """Whose row it is."""
        num_steady = len(self.steady)
        return self.steady.seqs[row] if row < num_steady else self.records[row - num_steady].seq

    def sampled(self) -> list[Sequence]:
        """Whose next token it samples."""
        return [*self.steady.seqs, *(record.seq for record in self.records if record.sample)]

    @property
    def num_decodes(self) -> int:
        """How many rows compute a generated token alone."""
        return len(self.steady) + sum(record.is_decode for record in self.records)

    @property
    def num_rows(self) -> int:
        """How many sequences it computes."""
        return len(self.steady) + len(self.records)

    @property
    def num_tokens(self) -> int:
        """How many tokens it computes."""
        return len(self.steady) + sum(record.num_tokens for record in self.records)

    @property
    def num_prefill_tokens(self) -> int:
        """How many tokens the others compute."""
        return sum(record.num_tokens for record in self.records if not record.is_decode)


class DecodeSet:
    """The members, their clock, and what is due when.

    Attributes:
        age: steps taken.
        num_left: how many have ever left.
    """

    def __init__(self, block_size: int, max_model_len: int, order: ServingOrder) -> None:
        self.age = self.num_left = 0
        self._block_size, self._max_model_len, self._order = block_size, max_model_len, order
        self._rows = SteadyRows()
        self._shared = False  # a step in flight refers to `_rows`, so it is copied before it changes
        # By (start mod block size): they come to a block's boundary together. The value is the age at which one joined.
        self._phases: list[dict[Sequence, int]] = [{} for _ in range(block_size)]
        self._last_rows: defaultdict[int, dict[Sequence, None]] = defaultdict(dict)  # by the age behind its last row

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, seq: Sequence) -> None:
        """Take in a running sequence that lacks one token, known or on its way, unless it gets no further row."""
        assert seq.steady is None and seq.num_uncomputed_tokens == 1, f"{seq} is no steady decode"  # noqa: PT018
        start = seq.num_computed_tokens - self.age
        last_age = seq.max_num_tokens(self._max_model_len) - 1 - start
        if last_age <= self.age:
            return
        rows = self._own_rows()
        rows.insert(bisect.bisect(rows.seqs, self._order(seq), key=self._order), seq, start)
        self._phases[start % self._block_size][seq] = self.age
        self._last_rows[last_age][seq] = None
        seq.ride(self)

    def leave(self, seq: Sequence) -> None:
        """Let a member go its own way, as far as it is. Harmless for one that is none."""
        if seq.steady is not self:
            return
        rows = self._own_rows()
        at = rows.seqs.index(seq)
        start = rows.starts[at]
        rows.remove(at)
        del self._phases[start % self._block_size][seq]
        last_age = seq.max_num_tokens(self._max_model_len) - 1 - start
        due = self._last_rows[last_age]
        del due[seq]
        if not due:
            del self._last_rows[last_age]
        seq.alight()
        self.num_left += 1

    def clear(self) -> None:
        """Everybody leaves."""
        for seq in self._rows.seqs[:]:
            self.leave(seq)

    def _own_rows(self) -> SteadyRows:
        if self._shared:
            self._rows, self._shared = self._rows.copy(), False
        return self._rows

    def at_boundary(self) -> list[Sequence]:
        """Whose next token is the first of a block, in serving order."""
        return sorted(self._phases[-self.age % self._block_size], key=self._order)

    def step(self, in_flight: SteadyRows | None, grown: list[Sequence]) -> tuple[SteadyRows, DecodeRows]:
        """Every member computes one token; who has got all its rows with this one leaves.

        Args:
            in_flight: the members that the step in flight computes; None when there is no such step.
            grown: who got a new block for it.

        Returns:
            The members, which do not change any more, and the same for the workers.
        """
        rows, age = self._rows, self.age
        tokens: IntColumn | None = None
        if in_flight is None:
            tokens = int_column([ids[-1] for ids in rows.token_ids])
        elif in_flight is not rows:
            known = zip(rows.token_ids, rows.starts, strict=True)
            tokens = int_column([ids[-1] if len(ids) > start + age else PREVIOUS_SAMPLE for ids, start in known])
        grown = [seq for seq in grown if seq.steady is self]
        blocks = [(seq.seq_id, seq.block_table[-1]) for seq in grown]
        for seq in grown:
            seq.num_sent_blocks = len(seq.block_table)
        self.age += 1
        self._shared = True
        for seq in list(self._last_rows.get(self.age, ())):
            self.leave(seq)
        return rows, DecodeRows(rows.seq_ids, rows.starts, age, tokens, blocks)

    def take_tokens(
        self, flight: StepInFlight, output: StepOutput, eos_token_ids: frozenset[int]
    ) -> tuple[list[int], SteadyRows, list[int]]:
        """Append to each row of a step what it sampled, where that is a token like any other.

        Returns:
            The rows that want a look of their own, with nothing appended: those that left meanwhile, that end now
            perhaps, or that have more to tell. Then the others, and their tokens.
        """
        rows, tokens = flight.steady, output.tokens.singles(len(flight.steady))
        if tokens is None:
            return [*range(len(rows))], SteadyRows(), []
        odd = {row for row in output.logprobs if row < len(rows)}
        if flight.num_left != self.num_left:
            odd.update(row for row, seq in enumerate(rows.seqs) if seq.steady is None)
        if 1 in rows.watched:
            odd.update(row for row, watched in enumerate(rows.watched) if watched)
        if not eos_token_ids.isdisjoint(tokens):
            odd.update(row for row, token in enumerate(tokens) if token in eos_token_ids)
        apart = sorted(odd)
        if apart:
            rows, tokens = rows.without(apart), without(tokens, apart)
        for token_ids, token in zip(rows.token_ids, tokens, strict=True):
            token_ids.append(token)
        return apart, rows, tokens

    def filled(self, age: int) -> list[tuple[Sequence, int]]:
        """The members whose row of the step taken at `age` completed a block, and their number of tokens by then."""
        phase, steps_ago = self._phases[-(age + 1) % self._block_size], self.age - (age + 1)
        return [(seq, seq.num_computed_tokens - steps_ago) for seq, joined in phase.items() if joined <= age]

    def check_invariants(self) -> None:
        """Raise AssertionError unless columns, members and calendars agree."""
        rows = self._rows
        assert all(len(getattr(rows, name)) == len(rows) for name in _COLUMNS), "columns of different lengths"
        assert rows.seqs == sorted(rows.seqs, key=self._order), "out of order"
        fresh = SteadyRows()
        for at, seq in enumerate(rows.seqs):
            assert seq.steady is self, f"{seq} does not know where it is"
            assert seq.num_sent_blocks == len(seq.block_table), f"{seq} is not what the workers know"
            assert len(seq.block_table) == -(-seq.num_computed_tokens // self._block_size), (
                f"{seq} has a block too many"
            )
            start = seq.num_computed_tokens - self.age
            assert self._phases[start % self._block_size][seq] <= self.age, f"{seq} comes to the wrong boundaries"
            last_age = seq.max_num_tokens(self._max_model_len) - 1 - start
            assert last_age > self.age, f"{seq} gets rows beyond its length"
            assert seq in self._last_rows[last_age], f"{seq} leaves at the wrong age"
            fresh.insert(at, seq, start)
        assert fresh == rows, "a column is stale"
        # A member writes without looking. A tail that it shares is copied by the others, which may not be members.
        written = [seq.block_table[-1] for seq in rows.seqs if seq.num_computed_tokens % self._block_size]
        assert len(set(written)) == len(written), "two steady decodes write into the same block"
        assert all(a is b for a, b in zip(rows.token_ids, fresh.token_ids, strict=True)), (
            "a list of tokens was replaced"
        )
        for calendar in (self._phases, list(self._last_rows.values())):
            assert sum(map(len, calendar)) == len(rows), "somebody who left is still expected"
