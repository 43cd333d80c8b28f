"""Messages survive their trip, and malformed ones are refused with a typed error."""

from __future__ import annotations

import pickle
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ChannelError
from nanoengine.messages import (
    Abort,
    AddRequest,
    BlockMap,
    Deltas,
    EngineFailure,
    EngineState,
    Hello,
    Ready,
    Recovering,
    ResetPrefixCache,
    SequenceRow,
    SharedPrefix,
    StateRequest,
    TokenColumns,
    TokenDelta,
    decode,
    encode,
)
from nanoengine.step import (
    PREVIOUS_SAMPLE,
    DecodeRows,
    Epoch,
    PromptLogprobs,
    RowParams,
    SequenceState,
    StepInput,
    StepOutput,
    int_column,
)

MESSAGES = [
    Hello("client"),
    Hello("client", {"num_swaps": 3, "steps_by_tokens": [1, 2], "restarts": {"died": 1}, "recovery_seconds": 0.5}),
    AddRequest("c", "r", [1, 2, 3], {"temperature": 0.5, "stop": ["a"]}, 2**63 - 1, 1.5, 0, [[4, 5]]),
    AddRequest("c", "r", [1], {}, 0, 1.5, 0, [[]], cache_salt="tenant", num_prompt_logprobs=3),
    Abort("r", None, "client went away"),
    ResetPrefixCache(),
    Ready(1, 100, 16, 4096, "bfloat16", "cpu"),
    Deltas(1, [TokenDelta("r", 0, 3, [7], "stop", 9, None, {"queue_seconds": 0.25}), TokenDelta("s", 0, 0, [])]),
    Deltas(1, [TokenColumns(["r", "s"], [0, 1], [3, -4], 9, [7, 8]), TokenDelta("s", 0, 0, [])]),
    Deltas(1, [TokenDelta("r", 0, 0, [], prompt_logprobs=PromptLogprobs(7, 2, b"01234567", b"89abcdef", b"0123"))]),
    StateRequest(),
    EngineState(
        1,
        2.5,
        3,
        4,
        5,
        6,
        7,
        8,
        9,
        BlockMap(2, 2, 1, 0, 1, 1, b"\0\0", b"\xff\0", b"\0\xff"),
        BlockMap(0, 0, 1, 0, 0, 0, b"", b"", b""),
        [SharedPrefix(1, 2, 1, 1)],
        b"\0\1",
        [SequenceRow("r", 0, "running", 3, 4, 1, 2, 1, 0, 0.5)],
    ),
    Recovering(2, {"kind": "WorkerError", "message": "rank 1 died", "rank": 1}),
    EngineFailure(2, {"kind": "WorkerError", "message": "rank 1 died", "rank": 1}),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_message_survives_its_trip(message: Any) -> None:
    assert decode(encode(message)) == message


UNEVEN = msgpack.packb([5, 1, [[["r"], [0], [1, 2], 0, [7]]]])


@pytest.mark.parametrize(
    "frame",
    [b"", b"\xc1", msgpack.packb([99]), msgpack.packb([1]), msgpack.packb(7), msgpack.packb([5, 1, [[1]]]), UNEVEN],
)
def test_malformed_message_is_a_channel_error(frame: bytes) -> None:
    with pytest.raises(ChannelError):
        decode(frame)


ids = st.integers(0, 2**40)
rows = st.builds(
    SequenceState,
    seq_id=ids,
    token_ids=st.lists(st.integers(PREVIOUS_SAMPLE, 2**31), min_size=1, max_size=9),
    num_computed_tokens=ids,
    new_block_ids=st.lists(ids, max_size=4),
    sample=st.booleans(),
    num_prompt_tokens=st.just(0),
    params=st.none(),
) | st.builds(
    SequenceState,
    seq_id=ids,
    token_ids=st.lists(ids, min_size=1, max_size=9),
    num_computed_tokens=ids,
    new_block_ids=st.lists(ids, max_size=4),
    sample=st.booleans(),
    num_prompt_tokens=ids,
    params=st.builds(RowParams, st.floats(0, 2), ids, st.floats(0, 1), st.floats(0, 1), ids, ids),
)


@given(st.lists(rows, max_size=6), st.lists(st.tuples(ids, ids, ids), max_size=3), st.lists(ids, max_size=3))
def test_step_input_survives_its_trip(state: list[SequenceState], copies: list, finished: list[int]) -> None:
    step = StepInput(Epoch(2, 3), 17, copies, state, finished)
    assert StepInput.unpack(pickle.loads(step.pack())) == step  # noqa: S301 - our own bytes


@given(st.lists(st.tuples(ids, ids, ids), max_size=6), ids, st.booleans(), st.lists(rows, max_size=2))
def test_steady_rows_survive_their_trip(columns: list, age: int, known: bool, states: list[SequenceState]) -> None:
    seq_ids, starts, tokens = ([entry[i] for entry in columns] for i in range(3))
    blocks = [(seq_id, 2**40) for seq_id in seq_ids[:2]]
    decodes = DecodeRows(int_column(seq_ids), int_column(starts), age, int_column(tokens) if known else None, blocks)
    step = StepInput(Epoch(2, 3), 17, [], states, [], decodes if columns else DecodeRows())
    assert StepInput.unpack(pickle.loads(step.pack())) == step  # noqa: S301 - our own bytes


@given(st.lists(st.lists(ids, max_size=3), max_size=6))
def test_step_output_survives_its_trip(token_ids: list[list[int]]) -> None:
    output = StepOutput(Epoch(2, 3), 17, list(range(len(token_ids))), token_ids, 0.5)
    assert StepOutput.unpack(pickle.loads(output.pack())) == output  # noqa: S301 - our own bytes


def test_prompt_log_probabilities_survive_their_trip_and_malformed_ones_are_refused() -> None:
    told = PromptLogprobs(7, 2, b"01234567", b"89abcdef", b"0123")
    output = StepOutput(Epoch(2, 3), 17, [5, 6], [[], [1]], 0.5, {}, {0: told})
    columns = pickle.loads(output.pack())  # noqa: S301 - our own bytes
    assert StepOutput.unpack(columns) == output
    for broken in ({2: told}, {0: told[:4]}, {0: told._replace(ranks=b"01234567")}):
        with pytest.raises(ChannelError):
            StepOutput.unpack((*columns[:-2], broken, columns[-1]))


@pytest.mark.parametrize("columns", [None, (), (1, 2), ((1, 1), 1, [], [1], [5], [1], [0], [0], [], b"", [], [])])
def test_malformed_step_is_a_channel_error(columns: Any) -> None:
    with pytest.raises(ChannelError):
        StepInput.unpack(columns)
    with pytest.raises(ChannelError):
        StepOutput.unpack(columns)
