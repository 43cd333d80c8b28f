"""Messages between the scheduler and its workers: what one step computes, and what came of it.

Columnar and primitive: columns of ints as bytes, one entry a row, so that packing costs little, the restricted
unpickler accepts them, and a steady decode step has the same size whatever the length of its contexts. This module
knows neither the channel that carries them nor the tensors that are made of them.
"""

from __future__ import annotations

import dataclasses
import pickle
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from configs.errors import ChannelError
from nanoengine.prompt_log import PromptLogprobs as PromptLogprobs  # a part of the messages, for workers too

# A token id that stands for "the id sampled for this row in step_id - 1": rank 0 knows it and hands it to the
# others through the collective, so that a step can be submitted before the one before it has returned.
PREVIOUS_SAMPLE = -1

# Directions of a block copy.
DEVICE_TO_DEVICE, DEVICE_TO_HOST, HOST_TO_DEVICE = 0, 1, 2
# (direction, source block, destination block)
BlockCopy: TypeAlias = "tuple[int, int, int]"


class Epoch(NamedTuple):
    """One life of a worker group: the scheduler's incarnation, then the group's number within it."""

    incarnation: int
    group: int


class RowParams(NamedTuple):
    """What the sampler needs of a sequence, sent once with its state.

    `top_k` 0 keeps all tokens; `sequence_index` is the sequence's index within its request, part of the draw's counter.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    sequence_index: int


# A column of ints, 4 bytes an entry where all fit, else 8: made once, kept as it is, read as a buffer by whoever wants
# vectors of it.
IntColumn: TypeAlias = "array[int]"


def int_column(numbers: Sequence[int]) -> IntColumn:
    """A column of these numbers."""
    if isinstance(numbers, array):
        return numbers
    try:
        return array("i", numbers)
    except OverflowError:
        return array("q", numbers)


def _pack_column(column: IntColumn) -> bytes:
    """The type code of the entries, then the entries."""
    return column.typecode.encode() + column.tobytes()


def _unpack_column(packed: bytes) -> IntColumn:
    column: IntColumn = array("i" if packed[:1] == b"i" else "q")
    column.frombytes(packed[1:])
    return column


def _pack_ints(numbers: list[int]) -> bytes:
    return _pack_column(int_column(numbers))


def _unpack_ints(packed: bytes) -> list[int]:
    return _unpack_column(packed).tolist()


def _split(flat: list[int], counts: list[int]) -> list[list[int]]:
    """Cut `flat` into lists of `counts` entries. Raises ValueError when that does not use it up."""
    parts, at = [], 0
    for count in counts:
        parts.append(flat[at : at + count] if count else [])
        at += count
    if at != len(flat):
        raise ValueError("counts do not add up")
    return parts


class TokenLists(Sequence[list[int]]):
    """A list of token ids for each row, kept as columns; reads like the list of lists that it stands for.

    Attributes:
        flat: the ids of all rows, in the rows' order.
        counts: how many belong to each row; None when each row has one.
    """

    __slots__ = ("_rows", "counts", "flat")

    def __init__(self, flat: IntColumn, counts: IntColumn | None = None) -> None:
        self.flat, self.counts = flat, counts
        self._rows: list[list[int]] | None = None  # made when somebody asks for a row

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> TokenLists:
        """Columns of the lists that are given."""
        if isinstance(rows, cls):
            return rows
        counts = [len(ids) for ids in rows]
        flat = int_column([token for ids in rows for token in ids])
        return cls(flat, None if counts.count(1) == len(counts) else int_column(counts))

    def rows(self) -> list[list[int]]:
        """The lists. Raises ValueError when the columns do not fit together."""
        if self._rows is None:
            flat = self.flat.tolist()
            self._rows = [[t] for t in flat] if self.counts is None else _split(flat, self.counts.tolist())
        return self._rows

    def singles(self, num_rows: int) -> list[int] | None:
        """The tokens of the first rows, one each; None when one of them has another number of tokens."""
        if self.counts is not None and self.counts[:num_rows].count(1) != num_rows:
            return None
        return self.flat[:num_rows].tolist()

    def __len__(self) -> int:
        return len(self.flat if self.counts is None else self.counts)

    def __getitem__(self, row: Any) -> Any:
        return self.rows()[row]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows())

    def __eq__(self, other: object) -> bool:
        return self.rows() == (other.rows() if isinstance(other, TokenLists) else other)

    __hash__ = None  # type: ignore[assignment]  # it may be compared with a list

    def __repr__(self) -> str:
        return repr(self.rows())


# Log-probabilities of one sampled token: ids, the sampled one first and then the likeliest in their order, the
# log-probability of each, and the rank of the sampled one (1 is the likeliest).
TokenLogprobs: TypeAlias = "tuple[list[int], list[float], int]"


class RowExtras(NamedTuple):
    """What changes a row's logits before temperature, and what is told of them; None for a row without any of it.

    Primitives only. `allowed_token_ids` empty allows all; `stop_token_ids` (eos among them) are masked while fewer
    than `min_tokens` tokens are generated; each of `bad_words` is a sequence of ids whose last is masked where the
    others were just generated. `num_logprobs` of the likeliest tokens' log-probabilities are told, none if it is -1.
    The same goes for `num_prompt_logprobs` and the prompt's tokens, from entry `first_prompt_logprob` on (see
    `PromptLogprobs`); the entries before it were told already.
    `grammar`, in llguidance's form, is what the output must match; under `ignore_eos` eos then waits until the
    grammar allows nothing else.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int = -1
    num_prompt_logprobs: int = -1
    first_prompt_logprob: int = 0
    grammar: str = ""
    ignore_eos: bool = False

    @property
    def looks_back(self) -> bool:
        """Whether what is sampled depends on the row's tokens so far, cached ones included."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.bad_words or self.grammar)

    @property
    def needs_past(self) -> bool:
        """Whether the row's tokens so far travel with its state.

        They do for the prompt's log-probabilities too: the last position of a chunk predicts the next chunk's first.
        """
        return self.looks_back or self.num_prompt_logprobs >= 0

    @property
    def concerns_sampling(self) -> bool:
        """Whether there is anything but the prompt's log-probabilities."""
        return self._replace(num_prompt_logprobs=-1, first_prompt_logprob=0) != RowExtras()


@dataclasses.dataclass(slots=True)
class SequenceState:
    """One scheduled row: the lightweight state of a sequence, as much of it as a worker needs in this step.

    At prefill `token_ids` is the prompt or its chunk, at decode the last token alone (or PREVIOUS_SAMPLE).
    Token `token_ids[i]` stands at position `num_computed_tokens + i`.

    Attributes:
        seq_id: the scheduler's number of the sequence, unique within an epoch.
        token_ids: ids to compute in this step.
        num_computed_tokens: tokens whose K/V is in the cache already.
        new_block_ids: blocks to append to the row's block table; with `params`, the whole table.
        sample: whether the last token's logits are sampled (false for a partial prompt).
        num_prompt_tokens: length of the prompt; together with `params` only.
        params: sent when the row is new to the workers or resumed: the row's state starts afresh. Else None.
        extras: together with `params` only, for a row that has any.
        past_token_ids: prompt and output so far, together with `extras` that need them.
    """

    seq_id: int
    token_ids: list[int]
    num_computed_tokens: int
    new_block_ids: list[int]
    sample: bool
    num_prompt_tokens: int = 0
    params: RowParams | None = None
    extras: RowExtras | None = None
    past_token_ids: Sequence[int] = ()


@dataclasses.dataclass(slots=True)
class DecodeRows:
    """Rows that compute one token each and sample the one behind it, all known to the workers: a busy engine's most.

    Columns, one entry a row. From one step to the next of the same rows nothing changes but `age` and the tokens.

    Attributes:
        seq_ids: as in `SequenceState`.
        starts: row i has computed `starts[i] + age` tokens already.
        age: see `starts`.
        token_ids: what each computes; None stands for PREVIOUS_SAMPLE in every row.
        new_blocks: (seq_id, block) of each block to append to a row's table, in order.
    """

    seq_ids: IntColumn = dataclasses.field(default_factory=lambda: array("i"))
    starts: IntColumn = dataclasses.field(default_factory=lambda: array("i"))
    age: int = 0
    token_ids: IntColumn | None = None
    new_blocks: list[tuple[int, int]] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        return len(self.seq_ids)

    def states(self) -> list[SequenceState]:
        """The same as a list of rows, for whoever does not mind the time."""
        tokens = [PREVIOUS_SAMPLE] * len(self) if self.token_ids is None else self.token_ids
        rows = {
            seq_id: SequenceState(seq_id, [token], start + self.age, [], True)
            for seq_id, token, start in zip(self.seq_ids, tokens, self.starts, strict=True)
        }
        for seq_id, block in self.new_blocks:
            rows[seq_id].new_block_ids.append(block)
        return list(rows.values())

    def columns(self) -> tuple[Any, ...]:
        """Primitives to pickle."""
        tokens = None if self.token_ids is None else _pack_column(self.token_ids)
        blocks = _pack_ints([number for pair in self.new_blocks for number in pair])
        return _pack_column(self.seq_ids), _pack_column(self.starts), self.age, tokens, blocks

    @classmethod
    def of_columns(cls, columns: Any) -> DecodeRows:
        """Inverse of `columns`; raises ValueError, TypeError or IndexError when they do not fit together."""
        seq_ids, starts, age, tokens, packed_blocks = columns
        token_ids = None if tokens is None else _unpack_column(tokens)
        blocks = _unpack_ints(packed_blocks)
        pairs = list(zip(blocks[::2], blocks[1::2], strict=True))
        rows = cls(_unpack_column(seq_ids), _unpack_column(starts), age + 0, token_ids, pairs)
        if len(rows.starts) != len(rows) or (token_ids is not None and len(token_ids) != len(rows)):
            raise ValueError("columns of different lengths")
        return rows


@dataclasses.dataclass(slots=True)
class StepInput:
    """One step's work, the same for every rank.

    Attributes:
        epoch: the group this step is meant for.
        step_id: counts up by one within an epoch, from 1.
        copies: ordered (direction, source block, destination block); every rank performs them before computing.
        states: scheduled sequences that are not among `decodes`; they follow them in the batch, in this order.
        finished: seq_ids whose rows are dropped before this step (an unknown one is ignored).
        decodes: the steady rows, as columns.
    """

    epoch: Epoch
    step_id: int
    copies: list[BlockCopy]
    states: list[SequenceState]
    finished: list[int]
    decodes: DecodeRows = dataclasses.field(default_factory=DecodeRows)

    @property
    def num_rows(self) -> int:
        """How many sequences are scheduled."""
        return len(self.decodes) + len(self.states)

    @property
    def rows(self) -> list[SequenceState]:
        """Every scheduled sequence in the batch's order, steady rows spelt out: for reading, it costs time."""
        return [*self.decodes.states(), *self.states]

    def pack(self) -> bytes:
        """Columnar pickle of primitives."""
        columns = (
            tuple(self.epoch),
            self.step_id,
            [number for copy in self.copies for number in copy],
            self.decodes.columns() if self.decodes.seq_ids else None,
            _pack_states(self.states) if self.states else None,
            self.finished,
        )
        return pickle.dumps(columns, protocol=5)

    @classmethod
    def unpack(cls, columns: Any) -> StepInput:
        """Rebuild from what the channel's restricted unpickler read.

        Raises:
            ChannelError: the columns do not fit together.
        """
        try:
            epoch, step_id, copies, decodes, states, finished = columns
            triples = [(copies[i], copies[i + 1], copies[i + 2]) for i in range(0, len(copies), 3)]
            steady = DecodeRows() if decodes is None else DecodeRows.of_columns(decodes)
            return cls(
                Epoch(*epoch), step_id, triples, [] if states is None else _unpack_states(states), finished, steady
            )
        except (TypeError, ValueError, IndexError) as error:
            raise ChannelError(f"malformed step input: {error}") from error


@dataclasses.dataclass(slots=True)
class GaveUp:
    """Rank → scheduler: there was no memory for the step, for that `reason`; I compute none until I hear `Forget`."""

    step_id: int
    reason: str


@dataclasses.dataclass(slots=True)
class Forget:
    """Scheduler → rank: every step so far is void. Forget all rows; the next step knows nothing of them either."""


def _pack_states(rows: list[SequenceState]) -> tuple[Any, ...]:
    return (
        _pack_ints([row.seq_id for row in rows]),
        _pack_ints([len(row.token_ids) for row in rows]),
        _pack_ints([token for row in rows for token in row.token_ids]),
        _pack_ints([row.num_computed_tokens for row in rows]),
        _pack_ints([len(row.new_block_ids) for row in rows]),
        _pack_ints([block for row in rows for block in row.new_block_ids]),
        bytes([row.sample for row in rows]),
        [(i, row.num_prompt_tokens, *row.params) for i, row in enumerate(rows) if row.params is not None],
        [(i, tuple(row.extras), row.past_token_ids) for i, row in enumerate(rows) if row.extras is not None],
    )


def _unpack_states(columns: Any) -> list[SequenceState]:
    seq_ids, num_new, tokens, computed, num_blocks, blocks, sample, params_of, extras_of = columns
    rows = list(
        map(
            SequenceState,
            _unpack_ints(seq_ids),
            _split(_unpack_ints(tokens), _unpack_ints(num_new)),
            _unpack_ints(computed),
            _split(_unpack_ints(blocks), _unpack_ints(num_blocks)),
            map(bool, sample),
        )
    )
    if len(rows) != len(sample):
        raise ValueError("columns of different lengths")
    for i, num_prompt_tokens, *params in params_of:
        rows[i].num_prompt_tokens, rows[i].params = num_prompt_tokens, RowParams(*params)
    for i, values, past_token_ids in extras_of:
        rows[i].extras, rows[i].past_token_ids = RowExtras(*values), past_token_ids
    return rows


@dataclasses.dataclass(slots=True)
class StepOutput:
    """What rank 0 sampled: for each row of the step, in its order, the ids that it sampled.

    Attributes:
        seq_ids: of each row; kept as a column.
        token_ids: one list a row; empty for a row that did not sample, several under speculation. Kept as columns.
        compute_seconds: wall time of the step on rank 0.
        logprobs: for each row (by its number) that asked for them, one entry a sampled token.
        prompt_logprobs: for each row (by its number) that asked for them, what this step told of its prompt.
        errors: `configs.errors.to_wire` of what ended a row, by its number; such a row has no token.
    """

    epoch: Epoch
    step_id: int
    seq_ids: Sequence[int]
    token_ids: Sequence[Sequence[int]]
    compute_seconds: float = 0.0
    logprobs: dict[int, list[TokenLogprobs]] = dataclasses.field(default_factory=dict)
    prompt_logprobs: dict[int, PromptLogprobs] = dataclasses.field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seq_ids, self.token_ids = int_column(self.seq_ids), TokenLists.of(self.token_ids)

    @property
    def tokens(self) -> TokenLists:
        """`token_ids` as columns."""
        return TokenLists.of(self.token_ids)

    def pack(self) -> bytes:
        """Columnar pickle of primitives."""
        tokens = self.tokens
        columns = (
            tuple(self.epoch),
            self.step_id,
            _pack_column(int_column(self.seq_ids)),
            None if tokens.counts is None else _pack_column(tokens.counts),
            _pack_column(tokens.flat),
            self.compute_seconds,
            self.logprobs,
            {row: tuple(chunk) for row, chunk in self.prompt_logprobs.items()},
            self.errors,
        )
        return pickle.dumps(columns, protocol=5)

    @classmethod
    def unpack(cls, columns: Any) -> StepOutput:
        """Rebuild from what the channel's restricted unpickler read. Raises ChannelError when malformed."""
        try:
            epoch, step_id, packed_seq_ids, counts, flat, seconds, logprobs, told, errors = columns
            seq_ids = _unpack_column(packed_seq_ids)
            tokens = TokenLists(_unpack_column(flat), None if counts is None else _unpack_column(counts))
            if len(tokens) != len(seq_ids) or (tokens.counts is not None and sum(tokens.counts) != len(tokens.flat)):
                raise ValueError("columns of different lengths")
            if any(len(entries) != len(tokens[row]) for row, entries in logprobs.items()):
                raise ValueError("a sampled token lacks its log-probabilities")
            prompt_logprobs = {row: PromptLogprobs.checked(fields) for row, fields in told.items()}
            if not all(0 <= row < len(seq_ids) for row in prompt_logprobs):
                raise ValueError("prompt log-probabilities of no row")
            if any(tokens[row] for row in errors):
                raise ValueError("a row that failed has a token")
            return cls(Epoch(*epoch), step_id, seq_ids, tokens, seconds, logprobs, prompt_logprobs, errors)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ChannelError(f"malformed step output: {error}") from error
