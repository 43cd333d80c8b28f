"""The worker's memory of its sequences, and the tensors of one step made from it; knows no model and no sampler.

A row is what a rank keeps of a sequence between steps: its block table, how far it is computed and its sampling
parameters. The scheduler owns the truth; a step that does not continue what is kept here is refused, since
computing it would write another sequence's K/V.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import torch

from configs.errors import EngineError
from nanoengine.step import PREVIOUS_SAMPLE, RowParams, SequenceState, StepInput
from workers.forward_context import AttentionMetadata
from workers.logits_processors import RowProcessor
from workers.sampler import SamplingRows
from workers.structured import GrammarMatchers

Int64Array = npt.NDArray[np.int64]


@dataclasses.dataclass(slots=True)
class _Row:
    """One sequence. `slot` is its line of the persistent block tables."""

    slot: int
    num_blocks: int
    num_computed_tokens: int
    params: RowParams
    processor: RowProcessor | None


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
        sampling: their parameters.
        previous: (token, seq_id) of each token that the step before sampled, in the order of the rows.
        processors: (row of the logits, position of the sampled token, processor) of the rows that have extras.
    """

    seq_ids: list[int]
    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    logits_rows: torch.Tensor
    sampled: list[int]
    sampling: SamplingRows
    previous: list[tuple[int, int]]
    processors: list[tuple[int, int, RowProcessor]]


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
        self._device = device
        self._samples = samples
        self._grammars = grammars
        self._rows: dict[int, _Row] = {}
        self._block_tables = np.zeros((8, -(-max_model_len // block_size)), dtype=np.int64)
        self._free_slots = list(range(len(self._block_tables)))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._rows

    def apply(self, step: StepInput) -> Batch | None:
        """Update the rows and build the step's tensors; None when no row is scheduled.

        Raises:
            EngineError: the step is malformed or does not continue a row; the message names the sequence.
        """
        for seq_id in step.finished:
            self._drop(seq_id)
        if len({state.seq_id for state in step.rows}) != len(step.rows):
            raise EngineError(f"step {step.step_id} schedules a sequence twice")
        for state in step.rows:
            self._update(state)
        return self._build(step.rows) if step.rows else None

    def _drop(self, seq_id: int) -> None:
        row = self._rows.pop(seq_id, None)
        if row is not None:
            self._free_slots.append(row.slot)

    def _update(self, state: SequenceState) -> None:
        row = self._rows.get(state.seq_id)
        if state.params is not None:
            slot = self._take_slot() if row is None else row.slot
            row = self._rows[state.seq_id] = _Row(
                slot, 0, state.num_computed_tokens, state.params, self._make_processor(state)
            )
        elif row is None:
            raise EngineError(f"sequence {state.seq_id} is unknown to the worker and came without parameters")
        elif row.num_computed_tokens != state.num_computed_tokens:
            raise EngineError(
                f"sequence {state.seq_id} continues at {state.num_computed_tokens}, "
                f"but {row.num_computed_tokens} of its tokens are computed"
            )
        self._check_tokens(state)
        self._append_blocks(row, state)
        if row.processor is not None and state.token_ids[0] != PREVIOUS_SAMPLE:
            row.processor.observe(state.num_computed_tokens, state.token_ids)
        row.num_computed_tokens += len(state.token_ids)
        if row.num_computed_tokens > row.num_blocks * self._block_size:
            raise EngineError(
                f"sequence {state.seq_id} has {row.num_blocks} blocks of {self._block_size} tokens "
                f"for {row.num_computed_tokens} tokens"
            )

    def _make_processor(self, state: SequenceState) -> RowProcessor | None:
        if state.extras is None or not self._samples:
            return None
        if state.extras.looks_back and len(state.past_token_ids) < state.num_computed_tokens + len(state.token_ids):
            raise EngineError(f"sequence {state.seq_id} came with parameters that look at its past, and without it")
        matcher = None
        if state.extras.grammar:
            assert self._grammars is not None, "a rank that samples has them"
            matcher = self._grammars.row(state.extras.grammar, state.past_token_ids[state.num_prompt_tokens :])
        return RowProcessor(state.extras, state.num_prompt_tokens, state.past_token_ids, matcher)

    def observe_previous(self, seq_id: int, token: int) -> None:
        """Tell a row, after `apply`, which token its PREVIOUS_SAMPLE stood for."""
        row = self._rows[seq_id]
        if row.processor is not None:
            row.processor.observe(row.num_computed_tokens - 1, [token])

    def _check_tokens(self, state: SequenceState) -> None:
        tokens, computed = state.token_ids, state.num_computed_tokens
        if not tokens or computed < 0 or computed + len(tokens) > self._max_model_len:
            raise EngineError(
                f"sequence {state.seq_id} computes {len(tokens)} tokens from position {computed}; "
                f"max_model_len is {self._max_model_len}"
            )
        # Only a decode may leave its token to the step before.
        least = PREVIOUS_SAMPLE if len(tokens) == 1 else 0
        if min(tokens) < least or max(tokens) >= self._vocab_size:
            raise EngineError(f"sequence {state.seq_id} has a token id outside the vocabulary of {self._vocab_size}")

    def _append_blocks(self, row: _Row, state: SequenceState) -> None:
        new = state.new_block_ids
        if not new:
            return
        end = row.num_blocks + len(new)
        if end > self._block_tables.shape[1] or min(new) < 0 or max(new) >= self._num_blocks:
            raise EngineError(
                f"sequence {state.seq_id} is given blocks {new} after {row.num_blocks} others; "
                f"the cache has {self._num_blocks} blocks and a table {self._block_tables.shape[1]}"
            )
        self._block_tables[row.slot, row.num_blocks : end] = new
        row.num_blocks = end

    def _take_slot(self) -> int:
        if not self._free_slots:
            size = len(self._block_tables)
            self._free_slots = list(range(size, 2 * size))
            self._block_tables = np.concatenate((self._block_tables, np.zeros_like(self._block_tables)))
        return self._free_slots.pop()

    def _build(self, states: list[SequenceState]) -> Batch:
        rows = [self._rows[state.seq_id] for state in states]
        query_lens = np.array([len(state.token_ids) for state in states], dtype=np.int64)  # (num_seqs,)
        seq_lens = np.array([row.num_computed_tokens for row in rows], dtype=np.int64)
        ends = query_lens.cumsum()
        of_token = np.repeat(np.arange(len(rows)), query_lens)  # (num_tokens,), the row of each token
        positions = np.arange(ends[-1]) + (seq_lens - ends)[of_token]

        num_columns = -(-int(seq_lens.max()) // self._block_size)
        tables = self._block_tables[[row.slot for row in rows], :num_columns]  # (num_seqs, num_columns)
        # A reused line of the table still holds its former owner's blocks behind the new one's.
        num_blocks = np.array([row.num_blocks for row in rows])
        tables[np.arange(num_columns) >= num_blocks[:, None]] = 0
        blocks = tables[of_token, positions // self._block_size]

        sampled = [i for i, state in enumerate(states) if state.sample]
        input_ids, at, slots, which, block_tables = self._to_device(
            np.array([token for state in states for token in state.token_ids], dtype=np.int64),
            positions,
            blocks * self._block_size + positions % self._block_size,
            ends[sampled] - 1,
            tables,
        )
        return Batch(
            seq_ids=[state.seq_id for state in states],
            input_ids=input_ids,
            positions=at,
            metadata=AttentionMetadata(
                query_lens=query_lens.tolist(),
                seq_lens=seq_lens.tolist(),
                slot_mapping=slots,
                block_tables=block_tables,
                block_size=self._block_size,
            ),
            logits_rows=which,
            sampled=sampled,
            sampling=_sampling_rows([rows[i] for i in sampled]),
            previous=[
                (int(end) - 1, state.seq_id)
                for end, state in zip(ends, states, strict=True)
                if state.token_ids[-1] == PREVIOUS_SAMPLE
            ],
            processors=[
                (number, rows[i].num_computed_tokens, processor)
                for number, i in enumerate(sampled)
                if (processor := rows[i].processor) is not None
            ],
        )

    def _to_device(self, *arrays: Int64Array) -> list[torch.Tensor]:
        """All arrays in one transfer: each costs a launch and a wait of its own on a GPU."""
        flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(self._device)
        parts = torch.split(flat, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _sampling_rows(rows: list[_Row]) -> SamplingRows:
    params = [row.params for row in rows]
    return SamplingRows(
        temperature=np.array([p.temperature for p in params], dtype=np.float64),
        top_k=np.array([min(p.top_k, 1 << 30) for p in params], dtype=np.int64),  # a client may send any
        top_p=np.array([p.top_p for p in params], dtype=np.float64),
        min_p=np.array([p.min_p for p in params], dtype=np.float64),
        seed=np.array([p.seed for p in params], dtype=np.uint64),
        index=np.array([p.sequence_index for p in params], dtype=np.uint64),
        # The token that these logits choose comes right after all that is computed.
        position=np.array([row.num_computed_tokens for row in rows], dtype=np.uint64),
    )
