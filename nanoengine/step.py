"""Messages between the scheduler and its workers: what one step computes, and what came of it.

Columnar and primitive: columns of ints as bytes, one entry a row, so that packing costs little, the restricted
unpickler accepts them, and a steady decode step has the same size whatever the length of its contexts. This module
knows neither the channel that carries them nor the tensors that are made of them.
"""

from __future__ import annotations

import dataclasses
import pickle
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from configs.errors import ChannelError

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


def _pack_ints(numbers: list[int]) -> bytes:
    """A column: the type code of its entries, 4 bytes wide where all fit, then the entries."""
    try:
        return b"i" + array("i", numbers).tobytes()
    except OverflowError:
        return b"q" + array("q", numbers).tobytes()


def _unpack_ints(column: bytes) -> list[int]:
    return memoryview(column)[1:].cast("i" if column[:1] == b"i" else "q").tolist()


def _split(flat: list[int], counts: list[int]) -> list[list[int]]:
    """Cut `flat` into lists of `counts` entries. Raises ValueError when that does not use it up."""
    if len(flat) == len(counts) == counts.count(1):
        return [[number] for number in flat]  # a step of decodes alone, the case to be quick in
    parts, at = [], 0
    for count in counts:
        parts.append(flat[at : at + count] if count else [])
        at += count
    if at != len(flat):
        raise ValueError("counts do not add up")
    return parts


# Log-probabilities of one sampled token: ids, the sampled one first and then the likeliest in their order, the
# log-probability of each, and the rank of the sampled one (1 is the likeliest).
TokenLogprobs: TypeAlias = "tuple[list[int], list[float], int]"


class RowExtras(NamedTuple):
    """What changes a row's logits before temperature, and what is told of them; None for a row without any of it.

    Primitives only. `allowed_token_ids` empty allows all; `stop_token_ids` (eos among them) are masked while fewer
    than `min_tokens` tokens are generated; each of `bad_words` is a sequence of ids whose last is masked where the
    others were just generated. `num_logprobs` of the likeliest tokens' log-probabilities are told, none if it is -1.
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
    grammar: str = ""
    ignore_eos: bool = False

    @property
    def looks_back(self) -> bool:
        """Whether the row's tokens so far matter: they travel with its state then, cached ones included."""
        penalised = self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0
        return bool(penalised or self.bad_words or self.grammar)


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
        past_token_ids: prompt and output so far, together with `extras` that look back.
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
class StepInput:
    """One step's work, the same for every rank.

    Attributes:
        epoch: the group this step is meant for.
        step_id: counts up by one within an epoch, from 1.
        copies: ordered (direction, source block, destination block); every rank performs them before computing.
        rows: scheduled sequences, decodes first; the order is the batch's order.
        finished: seq_ids whose rows are dropped before this step (an unknown one is ignored).
    """

    epoch: Epoch
    step_id: int
    copies: list[BlockCopy]
    rows: list[SequenceState]
    finished: list[int]

    def pack(self) -> bytes:
        """Columnar pickle of primitives."""
        rows = self.rows
        columns = (
            tuple(self.epoch),
            self.step_id,
            [number for copy in self.copies for number in copy],
            _pack_ints([row.seq_id for row in rows]),
            _pack_ints([len(row.token_ids) for row in rows]),
            _pack_ints([token for row in rows for token in row.token_ids]),
            _pack_ints([row.num_computed_tokens for row in rows]),
            _pack_ints([len(row.new_block_ids) for row in rows]),
            _pack_ints([block for row in rows for block in row.new_block_ids]),
            bytes([row.sample for row in rows]),
            [(i, row.num_prompt_tokens, *row.params) for i, row in enumerate(rows) if row.params is not None],
            [(i, tuple(row.extras), row.past_token_ids) for i, row in enumerate(rows) if row.extras is not None],
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
            (
                epoch,
                step_id,
                copies,
                seq_ids,
                num_new,
                tokens,
                computed,
                num_blocks,
                blocks,
                sample,
                states,
                extras,
                finished,
            ) = columns
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
            for i, num_prompt_tokens, *params in states:
                rows[i].num_prompt_tokens, rows[i].params = num_prompt_tokens, RowParams(*params)
            for i, values, past_token_ids in extras:
                rows[i].extras, rows[i].past_token_ids = RowExtras(*values), past_token_ids
            triples = [(copies[i], copies[i + 1], copies[i + 2]) for i in range(0, len(copies), 3)]
            return cls(Epoch(*epoch), step_id, triples, rows, finished)
        except (TypeError, ValueError, IndexError) as error:
            raise ChannelError(f"malformed step input: {error}") from error


@dataclasses.dataclass(slots=True)
class StepOutput:
    """What rank 0 sampled: for each row of the step, in its order, the ids that it sampled.

    Attributes:
        token_ids: one list a row; empty for a row that did not sample, several under speculation.
        compute_seconds: wall time of the step on rank 0.
        logprobs: for each row (by its number) that asked for them, one entry a sampled token.
        errors: `configs.errors.to_wire` of what ended a row, by its number; such a row has no token.
    """

    epoch: Epoch
    step_id: int
    seq_ids: list[int]
    token_ids: list[list[int]]
    compute_seconds: float = 0.0
    logprobs: dict[int, list[TokenLogprobs]] = dataclasses.field(default_factory=dict)
    errors: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def pack(self) -> bytes:
        """Columnar pickle of primitives."""
        counts = _pack_ints([len(ids) for ids in self.token_ids])
        flat = _pack_ints([token for ids in self.token_ids for token in ids])
        seq_ids = _pack_ints(self.seq_ids)
        facts = (self.compute_seconds, self.logprobs, self.errors)
        columns = (tuple(self.epoch), self.step_id, seq_ids, counts, flat, *facts)
        return pickle.dumps(columns, protocol=5)

    @classmethod
    def unpack(cls, columns: Any) -> StepOutput:
        """Rebuild from what the channel's restricted unpickler read. Raises ChannelError when malformed."""
        try:
            epoch, step_id, packed_seq_ids, counts, flat, seconds, logprobs, errors = columns
            seq_ids = _unpack_ints(packed_seq_ids)
            token_ids = _split(_unpack_ints(flat), _unpack_ints(counts))
            if len(token_ids) != len(seq_ids):
                raise ValueError("columns of different lengths")
            if any(len(entries) != len(token_ids[row]) for row, entries in logprobs.items()):
                raise ValueError("a sampled token lacks its log-probabilities")
            if any(token_ids[row] for row in errors):
                raise ValueError("a row that failed has a token")
            return cls(Epoch(*epoch), step_id, seq_ids, token_ids, seconds, logprobs, errors)
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ChannelError(f"malformed step output: {error}") from error
