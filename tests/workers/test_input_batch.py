"""The worker's rows: what a step becomes as tensors, and that a step which does not fit is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import EngineError
from nanoengine.step import (
    PREVIOUS_SAMPLE,
    DecodeRows,
    Epoch,
    RowExtras,
    RowParams,
    SequenceState,
    StepInput,
    int_column,
)
from workers.input_batch import Batch, InputBatch

PARAMS = RowParams(0.5, 3, 0.9, 0.1, 2**63 - 1, 4)


def make_batch(block_size: int = 4, samples: bool = True) -> InputBatch:
    return InputBatch(
        num_blocks=50,
        block_size=block_size,
        max_model_len=40,
        vocab_size=100,
        device=torch.device("cpu"),
        samples=samples,
    )


def state(
    seq_id: int,
    tokens: list[int],
    computed: int,
    blocks: list[int],
    params: RowParams | None = None,
    sample: bool = True,
) -> SequenceState:
    return SequenceState(seq_id, tokens, computed, blocks, sample, params=params)


def apply(batch: InputBatch, *rows: SequenceState, finished: tuple[int, ...] = ()) -> Batch | None:
    return batch.apply(StepInput(Epoch(1, 1), 1, [], list(rows), list(finished)))


def test_mixed_step_lays_out_tokens_slots_and_tables() -> None:
    """A chunk, then a decode beside a new prompt; positions and slots follow the tables, tails are padded with 0."""
    batch = make_batch()
    apply(batch, state(7, [1, 2, 3, 4, 5], 0, [9, 3], PARAMS, sample=False))
    made = apply(
        batch, state(7, [6], 5, []), state(8, [10, 11, 12], 4, [20, 21], PARAMS), state(9, [1], 0, [30], PARAMS)
    )
    assert made is not None
    assert made.seq_ids == [7, 8, 9]
    assert made.input_ids.tolist() == [6, 10, 11, 12, 1]
    assert made.positions.tolist() == [5, 4, 5, 6, 0]
    assert made.metadata.slot_mapping.tolist() == [3 * 4 + 1, 21 * 4, 21 * 4 + 1, 21 * 4 + 2, 30 * 4]
    assert made.metadata.block_tables.tolist() == [[9, 3], [20, 21], [30, 0]]
    assert made.metadata.query_lens == [1, 3, 1]
    assert made.metadata.seq_lens == [6, 7, 1]
    assert made.logits_rows.tolist() == [0, 3, 4]
    assert made.sampled == [0, 1, 2]
    assert made.sampling.position.tolist() == [6, 7, 1]
    assert {tensor.dtype for tensor in (made.input_ids, made.positions, made.logits_rows)} == {torch.int64}


def test_rows_that_need_no_logits_come_last() -> None:
    """Ranks that do not sample split them alike, although they make no processors."""
    greedy = RowParams(0.0, 0, 1.0, 0.0, 5, 0)
    told = state(3, [1], 0, [13], greedy)
    told.extras = RowExtras(num_logprobs=2)
    rows = [state(1, [1], 0, [11], greedy), state(2, [1], 0, [12], PARAMS), told, state(4, [1], 0, [14], greedy)]
    rows.append(state(5, [1], 0, [15], greedy, sample=False))
    for samples in (True, False):
        batch = make_batch(samples=samples)
        step = StepInput(Epoch(1, 1), 1, [], rows, [])
        made = batch.apply(step, all_logits=False)
        assert made is not None
        assert (made.sampled, made.num_logits, made.logits_rows.tolist()) == ([1, 2, 0, 3], 2, [1, 2, 0, 3])
        assert made.sampling.temperature.tolist() == [0.5, 0.0]
        assert [row for row, _, _ in made.processors] == [1] * samples
        step.states = [state(2, [1], 1, []), state(1, [1], 1, [])]
        made = batch.apply(step, all_logits=False)
        assert made is not None
        assert (made.sampled, made.num_logits) == ([0, 1], 1)
        step.states = [state(1, [1], 2, []), state(2, [1], 2, [])]
        made = batch.apply(step)
        assert made is not None
        assert (made.sampled, made.num_logits) == ([0, 1], 2)
        step.states = []
        step.decodes = DecodeRows(int_column([1, 2]), int_column([0, 0]), 3, int_column([7, 8]))
        made = batch.apply(step, all_logits=False)  # the same for rows that come as columns
        assert made is not None
        assert (made.sampled, made.num_logits, made.input_ids.tolist()) == ([1, 0], 1, [7, 8])
        assert made.sampling.temperature.tolist() == [0.5]


def test_partial_prompts_do_not_sample() -> None:
    """Trap 11: their logits are not even computed."""
    batch = make_batch()
    made = apply(batch, state(1, [1, 2], 0, [1], PARAMS, sample=False), state(2, [5, 6], 0, [2], PARAMS))
    assert made is not None
    assert made.sampled == [1]
    assert made.logits_rows.tolist() == [3]
    assert len(made.sampling.temperature) == 1


def test_parameters_stay_with_their_sequence() -> None:
    batch = make_batch()
    other = RowParams(0.0, 0, 1.0, 0.0, 5, 0)
    apply(batch, state(1, [1], 0, [1], PARAMS), state(2, [1], 0, [2], other))
    made = apply(batch, state(2, [1], 1, []), state(1, [1], 1, []))
    assert made is not None
    assert made.sampling.temperature.tolist() == [0.0, 0.5]
    assert made.sampling.top_k.tolist() == [0, 3]
    assert made.sampling.seed.tolist() == [5, 2**63 - 1]
    assert made.sampling.index.tolist() == [0, 4]


def test_previous_samples_are_named_in_row_order() -> None:
    batch = make_batch()
    apply(batch, state(1, [1], 0, [1], PARAMS), state(2, [1, 1], 0, [2], PARAMS), state(3, [1], 0, [3], PARAMS))
    made = apply(batch, state(3, [PREVIOUS_SAMPLE], 1, []), state(1, [9], 1, []), state(2, [PREVIOUS_SAMPLE], 2, []))
    assert made is not None
    assert made.previous == [(0, 3), (2, 2)]


def test_resumed_row_starts_afresh() -> None:
    """Parameters replace table and progress (traps 14, 53): no block of before may be read."""
    batch = make_batch()
    apply(batch, state(1, [1] * 12, 0, [5, 6, 7], PARAMS))
    made = apply(batch, state(1, [2] * 2, 4, [8, 9], PARAMS))
    assert made is not None
    assert made.metadata.block_tables.tolist() == [[8, 9]]
    assert made.positions.tolist() == [4, 5]


def test_reused_line_of_the_table_shows_nothing_of_its_former_owner() -> None:
    """Stale columns behind a shorter table (trap 41)."""
    batch = make_batch()
    apply(batch, state(1, [1] * 12, 0, [5, 6, 7], PARAMS))
    made = apply(batch, state(2, [1], 0, [8], PARAMS), state(3, [1] * 9, 0, [1, 2, 3], PARAMS), finished=(1,))
    assert made is not None
    assert made.metadata.block_tables.tolist() == [[8, 0, 0], [1, 2, 3]]


def test_finished_rows_are_dropped_and_unknown_ones_ignored() -> None:
    batch = make_batch()
    apply(batch, state(1, [1], 0, [1], PARAMS), state(2, [1], 0, [2], PARAMS))
    assert apply(batch, finished=(1, 1, 77)) is None
    assert 1 not in batch
    assert 2 in batch
    with pytest.raises(EngineError, match="sequence 1 is unknown"):
        apply(batch, state(1, [1], 1, []))


def test_many_sequences_come_and_go() -> None:
    """The table grows with the batch and lines are reused; nobody sees another's blocks."""
    batch = InputBatch(1000, 4, 40, 100, torch.device("cpu"))
    rng, live = np.random.default_rng(0), {}
    for step in range(30):
        gone = [seq_id for seq_id in live if rng.random() < 0.3]
        for seq_id in gone:
            del live[seq_id]
        new = {step * 100 + i: int(rng.integers(1000)) for i in range(rng.integers(1, 20))}
        rows = [state(seq_id, [1], computed, []) for seq_id, (computed, _) in live.items()]
        rows += [state(seq_id, [1], 0, [block], PARAMS) for seq_id, block in new.items()]
        made = apply(batch, *rows, finished=tuple(gone))
        assert made is not None
        live |= {seq_id: (0, block) for seq_id, block in new.items()}
        expected = [block for _, block in live.values()]
        assert made.metadata.block_tables[:, 0].tolist() == expected
        live = {seq_id: (computed + 1, block) for seq_id, (computed, block) in live.items() if computed < 3}
        apply(batch, finished=tuple(set(made.seq_ids) - set(live)))
        assert len(batch) == len(live)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (state(1, [1], 3, []), "continues at 3, but 2"),
        (state(1, [1], 1, []), "continues at 1, but 2"),
        (state(9, [1], 0, [1]), "sequence 9 is unknown"),
        (state(1, [], 2, []), "computes 0 tokens"),
        (state(1, [1] * 3, 2, []), "has 1 blocks of 4 tokens for 5 tokens"),
        (state(1, [1] * 39, 2, [1] * 10), "max_model_len is 40"),
        (state(1, [1], 2, [50]), "50 blocks"),
        (state(1, [1], 2, [-1]), "50 blocks"),
        (state(1, [1], 2, [1] * 10), "table 10"),
        (state(1, [100], 2, []), "outside the vocabulary"),
        (state(1, [-2], 2, []), "outside the vocabulary"),
        (state(1, [1, PREVIOUS_SAMPLE], 2, []), "outside the vocabulary"),
    ],
)
def test_a_step_that_does_not_fit_is_refused_by_name(row: SequenceState, message: str) -> None:
    """Computing it would write over another sequence's K/V, silently (traps 13, 21)."""
    batch = make_batch()
    apply(batch, state(1, [1, 2], 0, [3], PARAMS))
    with pytest.raises(EngineError, match=f"sequence {row.seq_id} .*{message}|{message}"):
        apply(batch, row)


def test_a_sequence_twice_in_a_step_is_refused() -> None:
    batch = make_batch()
    with pytest.raises(EngineError, match="twice"):
        apply(batch, state(1, [1], 0, [3], PARAMS), state(1, [1], 1, []))


def test_a_huge_top_k_does_not_overflow() -> None:
    made = apply(make_batch(), state(1, [1], 0, [3], PARAMS._replace(top_k=2**64)))
    assert made is not None
    assert made.sampling.top_k[0] > 2**24


def decodes(*rows: SequenceState, known: bool = True) -> DecodeRows:
    """The same rows as columns, at some age."""
    return DecodeRows(
        int_column([row.seq_id for row in rows]),
        int_column([row.num_computed_tokens - 1000 for row in rows]),
        1000,
        int_column([row.token_ids[0] for row in rows]) if known else None,
        [(row.seq_id, block) for row in rows for block in row.new_block_ids],
    )


def fields_of(batch: Batch | None) -> list:
    assert batch is not None
    tensors = (batch.input_ids, batch.positions, batch.logits_rows, batch.metadata.slot_mapping)
    return [
        [tensor.tolist() for tensor in (*tensors, batch.metadata.block_tables)],
        [batch.seq_ids, batch.sampled, batch.previous, batch.metadata.query_lens, batch.metadata.seq_lens],
        [getattr(batch.sampling, name).tolist() for name in ("temperature", "top_k", "seed", "index", "position")],
        [(number, position, processor._generated) for number, position, processor in batch.processors],
    ]


def test_steady_rows_make_the_batch_that_the_same_rows_make_one_by_one() -> None:
    """Rows come, go, change places, get blocks and look back; columns and states must not differ."""
    columns, single = make_batch(), make_batch()
    rng, live, computed = np.random.default_rng(1), list[int](), dict[int, int]()
    for step in range(40):
        gone = [seq_id for seq_id in live if rng.random() < 0.1 or computed[seq_id] > 30]
        live = [seq_id for seq_id in live if seq_id not in gone]
        if rng.random() < 0.2:
            rng.shuffle(live)
        known = bool(rng.random() < 0.5)
        rows = [
            state(
                i, [int(rng.integers(100)) if known else PREVIOUS_SAMPLE], computed[i], [step] * (computed[i] % 4 == 0)
            )
            for i in live
        ]
        prompts = []
        if len(live) < 12:
            extras = RowExtras(presence_penalty=1.0) if step % 3 == 0 else None
            prompts = [SequenceState(step, [5, 6, 7], 0, [step % 50], True, 3, PARAMS, extras, [5, 6, 7])]
            prompts.append(state(step + 100, [5] * 4, 0, [step % 50], PARAMS, sample=False))
        one = single.apply(StepInput(Epoch(1, 1), 1, [], [*rows, *prompts], gone))
        many = columns.apply(StepInput(Epoch(1, 1), 1, [], prompts, gone, decodes(*rows, known=known)))
        if one is None:
            assert many is None
        else:
            assert fields_of(many) == fields_of(one)
        for seq_id in live if not known else ():
            single.observe_previous(seq_id, step)
            columns.observe_previous(seq_id, step)
        computed |= {i: computed[i] + 1 for i in live} | {row.seq_id: len(row.token_ids) for row in prompts}
        live += [row.seq_id for row in prompts]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([state(1, [1], 2, []), state(2, [1], 3, [])], "sequence 2 continues at 3, but 2"),
        ([state(9, [1], 2, [])], "sequence 9 is unknown"),
        ([state(1, [1], 2, []), state(1, [1], 2, [])], "twice"),
        ([state(1, [1], 2, []), state(2, [100], 2, [])], "sequence 2 has a token id outside"),
        ([state(1, [1], 2, []), state(2, [-2], 2, [])], "sequence 2 has a token id outside"),
        ([state(1, [1], 2, []), state(2, [1], 2, [50])], "sequence 2 is given blocks .50. after 1 others"),
        ([state(1, [1], 2, []), state(3, [1], 4, [])], "sequence 3 has 1 blocks of 4 tokens for 5 tokens"),
        ([state(1, [1], 2, []), state(4, [1], 40, [])], "sequence 4 computes 1 tokens from position 40"),
    ],
)
def test_steady_rows_that_do_not_fit_are_refused_by_name(rows: list[SequenceState], message: str) -> None:
    batch = make_batch()
    prompts = [state(i, [1] * n, 0, list(range(-(-n // 4))), PARAMS) for i, n in ((1, 2), (2, 2), (3, 4), (4, 40))]
    batch.apply(StepInput(Epoch(1, 1), 1, [], prompts, []))
    with pytest.raises(EngineError, match=message):
        batch.apply(StepInput(Epoch(1, 1), 2, [], [], [], decodes(*rows)))


def test_line_of_a_steady_row_that_left_is_not_read_for_its_successor() -> None:
    """The same column of ids twice, with another owner of the line in between."""
    batch = make_batch()
    batch.apply(StepInput(Epoch(1, 1), 1, [], [state(1, [1], 0, [5], PARAMS)], []))
    batch.apply(StepInput(Epoch(1, 1), 2, [], [], [], decodes(state(1, [1], 1, []))))
    batch.apply(StepInput(Epoch(1, 1), 3, [], [state(2, [1], 0, [6], PARAMS)], [1]))
    with pytest.raises(EngineError, match="sequence 1 is unknown"):
        batch.apply(StepInput(Epoch(1, 1), 4, [], [], [], decodes(state(1, [1], 2, []))))
