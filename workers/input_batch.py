"""The worker's memory of its sequences, and the tensors of one step made from it; knows no model and no sampler.

A row is what a rank keeps of a sequence between steps: its block table, how far it is computed and its sampling
parameters, as a line of arrays, so that a step of decodes is built by a few vector operations. The scheduler owns the
truth; a step that does not continue what is kept here is refused, since computing it would write another sequence's
K/V.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import EngineError
from nanoengine.step import (
    PREVIOUS_SAMPLE,
    DecodeRows,
    IntColumn,
    PromptLogprobs,
    RowParams,
    SequenceState,
    StepInput,
    int_column,
)
from workers.forward_context import AttentionMetadata
from workers.logits_processors import RowProcessor
from workers.prompt_logprobs import PromptRows, PromptSpan
from workers.sampler import SamplingRows
from workers.staging import Staging
from workers.structured import GrammarMatchers

Int64Array = npt.NDArray[np.int64]


class _Rows:
    """What is kept of each sequence, as arrays with a line a sequence; a line is reused when its owner is gone.

    Attributes:
        block_tables: (num_lines, max_blocks) int64; behind `num_blocks` entries stands what a former owner left.
        num_blocks, num_computed: (num_lines,) int64.
        sampling: (num_lines,) each; its `position` is not used.
        only_argmax: (num_lines,) bool: greedy, and nothing but the likeliest id is asked for.
    """

    def __init__(self, max_blocks: int, num_lines: int = 8) -> None:
        self.block_tables: Int64Array = np.zeros((num_lines, max_blocks), dtype=np.int64)
        self.num_blocks: Int64Array = np.zeros(num_lines, dtype=np.int64)
        self.num_computed: Int64Array = np.zeros(num_lines, dtype=np.int64)
        self.sampling = SamplingRows(
            temperature=np.zeros(num_lines, dtype=np.float64),
            top_k=np.zeros(num_lines, dtype=np.int64),
            top_p=np.zeros(num_lines, dtype=np.float64),
            min_p=np.zeros(num_lines, dtype=np.float64),
            seed=np.zeros(num_lines, dtype=np.uint64),
            index=np.zeros(num_lines, dtype=np.uint64),
            position=np.zeros(num_lines, dtype=np.uint64),
        )
        self.only_argmax: npt.NDArray[np.bool_] = np.zeros(num_lines, dtype=np.bool_)
        self._free = list(range(num_lines))

    def take_line(self) -> int:
        if not self._free:
            size = len(self.num_blocks)
            self._free = list(range(size, 2 * size))
            for name in ("block_tables", "num_blocks", "num_computed", "only_argmax"):
                setattr(self, name, _doubled(getattr(self, name)))
            fields = dataclasses.fields(self.sampling)
            self.sampling = SamplingRows(*(_doubled(getattr(self.sampling, field.name)) for field in fields))
        return self._free.pop()

    def give_back(self, line: int) -> None:
        self._free.append(line)

    def begin(self, line: int, num_computed: int, params: RowParams, only_argmax: bool) -> None:
        """A sequence starts, or starts afresh, without blocks."""
        self.only_argmax[line] = only_argmax
        self.num_blocks[line], self.num_computed[line] = 0, num_computed
        rows = self.sampling
        rows.temperature[line], rows.top_p[line], rows.min_p[line] = params.temperature, params.top_p, params.min_p
        rows.top_k[line] = min(params.top_k, 1 << 30)  # a client may send any
        rows.seed[line], rows.index[line] = params.seed, params.sequence_index


def _doubled(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.concatenate((array, np.zeros_like(array)))


@dataclasses.dataclass(slots=True)
class _Steady:
    """The decode rows of the last step: while the same ones come again, what only depends on who they are stays.

    Attributes:
        seq_ids: the column that named them.
        lines: (num_rows,) int64, of `_Rows`.
        sampling: their parameters; `position` changes from step to step.
        processors: (row, processor) of those that have extras.
    """

    seq_ids: IntColumn
    lines: Int64Array
    sampling: SamplingRows
    processors: list[tuple[int, RowProcessor]]


@dataclasses.dataclass(slots=True)
class Batch:
    """One step, ready to be computed.

    Attributes:
        seq_ids: of each row.
        input_ids: (num_tokens,) int64; PREVIOUS_SAMPLE where `previous` says so.
        positions: (num_tokens,) int64.
        metadata: for the attention layers.
        logits_rows: (num_sampled,) int64, tokens whose logits are sampled.
        sampled: which rows they belong to.
        num_logits: how many of these, from the first, need all their logits; the others are `only_argmax`.
        sampling: parameters of those that need logits.
        previous: (token, seq_id) of each token that the step before sampled, in the order of the rows.
        processors: (row of the logits, position of the sampled token, processor) of the rows that have extras.
        argmax_ids: what came of the rows that need no logits, once computed, on rank 0.
        prompt_spans: tokens whose logits are told of, of prompts that ask for it.
        prompt_logprobs: what came of them, by row of the step; rank 0 only.
    """

    seq_ids: list[int]
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    logits_rows: torch.Tensor
    sampled: list[int]
    num_logits: int
    sampling: SamplingRows
    previous: list[tuple[int, int]]
    processors: list[tuple[int, int, RowProcessor]]
    argmax_ids: torch.Tensor | None = None
    prompt_spans: list[PromptSpan] = dataclasses.field(default_factory=list)
    prompt_logprobs: dict[int, PromptLogprobs] = dataclasses.field(default_factory=dict)


class InputBatch:
    """Rows by seq_id.

    Args:
        num_blocks: of the cache; every block id is below it.
        block_size: tokens in a block.
        max_model_len: no sequence is longer.
        vocab_size: every token id is below it.
        device: where the tensors of a step go.
        samples: whether this rank samples; others need nothing of a row's past.
        grammars: makes the matchers of rows that have a grammar; not needed where nothing is sampled.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        vocab_size: int,
        device: torch.device,
        samples: bool = True,
        grammars: GrammarMatchers | None = None,
    ) -> None:
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._staging = Staging(device)
        self._samples = samples
        self._grammars = grammars
        self._rows = _Rows(-(-max_model_len // block_size))
        self._line_of: dict[int, int] = {}  # by seq_id
        self._processors: dict[int, RowProcessor] = {}  # of the few that have extras, by seq_id
        self._prompts = PromptRows()
        self._steady = self._no_decodes = self._name_decodes(int_column([]))

    def __len__(self) -> int:
        return len(self._line_of)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._line_of

    def apply(self, step: StepInput, all_logits: bool = True) -> Batch | None:
        """Update the rows and build the step's tensors; None when no row is scheduled.

        Unless `all_logits`, rows that only need an argmax come last among those that sample.

        Raises:
            EngineError: the step is malformed or does not continue a row; the message names the sequence.
        """
        for seq_id in step.finished:
            self._drop(seq_id)
        seq_ids = [*step.decodes.seq_ids, *(state.seq_id for state in step.states)]
        if len(set(seq_ids)) != len(seq_ids):
            raise EngineError(f"step {step.step_id} schedules a sequence twice")
        self._advance(step.decodes)
        lines = [self._update(state) for state in step.states]
        return self._build(step, seq_ids, lines, all_logits) if seq_ids else None

    def observes(self, seq_id: int) -> bool:
        """Whether a row wants to be told, by `observe_previous`, which token its PREVIOUS_SAMPLE stood for."""
        return seq_id in self._processors

    def observe_previous(self, seq_id: int, token: int) -> None:
        """Tell a row, after `apply`, which token its PREVIOUS_SAMPLE stood for."""
        processor = self._processors.get(seq_id)
        if processor is not None:
            processor.observe(int(self._rows.num_computed[self._line_of[seq_id]]) - 1, [token])

    def _drop(self, seq_id: int) -> None:
        line = self._line_of.pop(seq_id, None)
        self._prompts.drop(seq_id)
        if line is not None:
            self._rows.give_back(line)
            self._processors.pop(seq_id, None)
            self._steady = self._no_decodes

    # -- steady rows --------------------------------------------------------------------------------------------

    def _name_decodes(self, seq_ids: IntColumn) -> _Steady:
        """Look up rows that decode. Raises EngineError for one that is not known."""
        lines = [self._line_of.get(seq_id) for seq_id in seq_ids]
        if None in lines:
            raise _unknown(seq_ids[lines.index(None)])
        at = np.array(lines, dtype=np.int64)
        found = ((row, self._processors.get(seq_id)) for row, seq_id in enumerate(seq_ids))
        processors = [(row, processor) for row, processor in found if processor is not None]
        return _Steady(seq_ids, at, self._rows.sampling.take(at), processors)

    def _advance(self, decodes: DecodeRows) -> None:
        """Take every decode row one token further."""
        if decodes.seq_ids != self._steady.seq_ids:
            self._steady = self._name_decodes(decodes.seq_ids)
        rows, lines = self._rows, self._steady.lines
        computed = np.asarray(decodes.starts, dtype=np.int64) + decodes.age  # (num_decodes,)
        wrong = computed != rows.num_computed[lines]
        if wrong.any():
            at = int(wrong.argmax())
            raise _gap(decodes.seq_ids[at], int(computed[at]), int(rows.num_computed[lines[at]]))
        if len(computed) and computed.max() >= self._max_model_len:
            at = int(computed.argmax())
            raise self._too_long(decodes.seq_ids[at], 1, int(computed[at]))
        if decodes.token_ids is not None:
            tokens = np.asarray(decodes.token_ids)
            wrong = (tokens < PREVIOUS_SAMPLE) | (tokens >= self._vocab_size)
            if wrong.any():
                raise self._no_token(decodes.seq_ids[int(wrong.argmax())])
            for row, processor in self._steady.processors:
                if tokens[row] != PREVIOUS_SAMPLE:
                    processor.observe(int(computed[row]), [int(tokens[row])])
        for seq_id, block in decodes.new_blocks:
            self._append_blocks(seq_id, self._line_of[seq_id], [block])
        rows.num_computed[lines] = computed + 1
        wrong = computed >= rows.num_blocks[lines] * self._block_size
        if wrong.any():
            at = int(wrong.argmax())
            raise self._outgrown(decodes.seq_ids[at], int(lines[at]))

    # -- any row ------------------------------------------------------------------------------------------------

    def _update(self, state: SequenceState) -> int:
        """Take a row as far as `state` says, and return its line."""
        seq_id, computed, tokens = state.seq_id, state.num_computed_tokens, state.token_ids
        rows, line = self._rows, self._line_of.get(seq_id)
        if state.params is not None:
            processor = self._make_processor(state)
            if line is None:
                line = self._line_of[seq_id] = rows.take_line()
            # Read from the step alone: every rank must take the same rows for it.
            rows.begin(line, computed, state.params, state.params.temperature == 0 and state.extras is None)
            self._processors.pop(seq_id, None)
            if processor is not None:
                self._processors[seq_id] = processor
            self._prompts.begin(state)
            self._steady = self._steady if seq_id not in self._steady.seq_ids else self._no_decodes
        elif line is None:
            raise _unknown(seq_id)
        elif rows.num_computed[line] != computed:
            raise _gap(seq_id, computed, int(rows.num_computed[line]))
        self._check_tokens(state)
        self._append_blocks(seq_id, line, state.new_block_ids)
        processor = self._processors.get(seq_id)
        if processor is not None and tokens[0] != PREVIOUS_SAMPLE:
            processor.observe(computed, tokens)
        rows.num_computed[line] = computed + len(tokens)
        if computed + len(tokens) > rows.num_blocks[line] * self._block_size:
            raise self._outgrown(seq_id, line)
        return line

    def _make_processor(self, state: SequenceState) -> RowProcessor | None:
        if state.extras is None or not self._samples or not state.extras.concerns_sampling:
            return None
        if state.extras.looks_back and len(state.past_token_ids) < state.num_computed_tokens + len(state.token_ids):
            raise EngineError(f"sequence {state.seq_id} came with parameters that look at its past, and without it")
        matcher = None
        if state.extras.grammar:
            assert self._grammars is not None, "a rank that samples has them"
            matcher = self._grammars.row(state.extras.grammar, state.past_token_ids[state.num_prompt_tokens :])
        return RowProcessor(state.extras, state.num_prompt_tokens, state.past_token_ids, matcher)

    def _check_tokens(self, state: SequenceState) -> None:
        tokens, computed = state.token_ids, state.num_computed_tokens
        if not tokens or computed < 0 or computed + len(tokens) > self._max_model_len:
            raise self._too_long(state.seq_id, len(tokens), computed)
        # Only a decode may leave its token to the step before.
        least = PREVIOUS_SAMPLE if len(tokens) == 1 else 0
        if min(tokens) < least or max(tokens) >= self._vocab_size:
            raise self._no_token(state.seq_id)

    def _append_blocks(self, seq_id: int, line: int, new: list[int]) -> None:
        if not new:
            return
        rows, start = self._rows, int(self._rows.num_blocks[line])
        if start + len(new) > rows.block_tables.shape[1] or min(new) < 0 or max(new) >= self._num_blocks:
            raise EngineError(
                f"sequence {seq_id} is given blocks {new} after {start} others; "
                f"the cache has {self._num_blocks} blocks and a table {rows.block_tables.shape[1]}"
            )
        rows.block_tables[line, start : start + len(new)] = new
        rows.num_blocks[line] = start + len(new)

    # -- tensors ------------------------------------------------------------------------------------------------

    def _build(self, step: StepInput, seq_ids: list[int], state_lines: list[int], all_logits: bool) -> Batch:
        rows, steady, states = self._rows, self._steady, step.states
        num_decodes = len(steady.lines)
        lines = np.concatenate((steady.lines, np.array(state_lines, dtype=np.int64)))  # (num_seqs,)
        query_lens = np.ones(len(lines), dtype=np.int64)
        query_lens[num_decodes:] = [len(state.token_ids) for state in states]
        seq_lens = rows.num_computed[lines]
        ends = query_lens.cumsum()
        of_token = np.repeat(np.arange(len(lines)), query_lens)  # (num_tokens,), the row of each token
        positions = np.arange(ends[-1]) + (seq_lens - ends)[of_token]

        num_columns = -(-int(seq_lens.max()) // self._block_size)
        tables = rows.block_tables[lines, :num_columns]  # (num_seqs, num_columns)
        # A reused line of the table still holds its former owner's blocks behind the new one's.
        tables[np.arange(num_columns) >= rows.num_blocks[lines][:, None]] = 0
        blocks = tables[of_token, positions // self._block_size]

        tokens = np.full(int(ends[-1]), PREVIOUS_SAMPLE, dtype=np.int64)
        if step.decodes.token_ids is not None:
            tokens[:num_decodes] = step.decodes.token_ids
        tokens[num_decodes:] = [token for state in states for token in state.token_ids]
        sampled = [*range(num_decodes), *(num_decodes + i for i, state in enumerate(states) if state.sample)]
        num_logits = len(sampled)
        if not all_logits:
            only_argmax = rows.only_argmax[lines].tolist()
            sampled.sort(key=only_argmax.__getitem__)
            num_logits -= sum(only_argmax[row] for row in sampled)
        slots = blocks * self._block_size + positions % self._block_size
        input_ids, at, slot_mapping, which, device_seq_lens, block_tables = self._staging.send(
            (tokens, positions, slots, ends[sampled] - 1, seq_lens, tables)
        )
        return Batch(
            seq_ids=seq_ids,
            input_ids=input_ids,
            positions=at,
            metadata=AttentionMetadata(
                query_lens=query_lens.tolist(),
                seq_lens=seq_lens.tolist(),
                slot_mapping=slot_mapping,
                block_tables=block_tables,
                block_size=self._block_size,
                device_seq_lens=device_seq_lens,
            ),
            logits_rows=which,
            sampled=sampled,
            num_logits=num_logits,
            sampling=self._sampling(lines, sampled, num_logits),
            previous=[
                (end, seq_ids[row]) for row, end in enumerate((ends - 1).tolist()) if tokens[end] == PREVIOUS_SAMPLE
            ],
            processors=self._sampling_processors(seq_ids, sampled, seq_lens),
            prompt_spans=self._prompts.spans(step.states, len(step.decodes)),
        )

    def _sampling(self, lines: Int64Array, sampled: list[int], num_logits: int) -> SamplingRows:
        """The parameters of the rows that sample from all their logits."""
        if num_logits == len(sampled) == len(self._steady.lines):
            found, lines = self._steady.sampling, self._steady.lines  # none but the decodes
        else:
            lines = lines[sampled[:num_logits]]
            found = self._rows.sampling.take(lines)
        # The token that these logits choose comes right after all that is computed.
        return dataclasses.replace(found, position=self._rows.num_computed[lines].astype(np.uint64))

    def _sampling_processors(
        self, seq_ids: list[int], sampled: list[int], seq_lens: Int64Array
    ) -> list[tuple[int, int, RowProcessor]]:
        if not self._processors:
            return []
        found = ((number, row, self._processors.get(seq_ids[row])) for number, row in enumerate(sampled))
        return [(number, int(seq_lens[row]), processor) for number, row, processor in found if processor is not None]

    # -- what may be wrong --------------------------------------------------------------------------------------

    def _too_long(self, seq_id: int, num_tokens: int, computed: int) -> EngineError:
        return EngineError(
            f"sequence {seq_id} computes {num_tokens} tokens from position {computed}; "
            f"max_model_len is {self._max_model_len}"
        )

    def _no_token(self, seq_id: int) -> EngineError:
        return EngineError(f"sequence {seq_id} has a token id outside the vocabulary of {self._vocab_size}")

    def _outgrown(self, seq_id: int, line: int) -> EngineError:
        return EngineError(
            f"sequence {seq_id} has {self._rows.num_blocks[line]} blocks of {self._block_size} tokens "
            f"for {self._rows.num_computed[line]} tokens"
        )


def _unknown(seq_id: int) -> EngineError:
    return EngineError(f"sequence {seq_id} is unknown to the worker and came without parameters")


def _gap(seq_id: int, asked: int, known: int) -> EngineError:
    return EngineError(f"sequence {seq_id} continues at {asked}, but {known} of its tokens are computed")
