"""Steady decodes as columns: the same steps, tokens and blocks as row by row, and no trace of who has left."""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine.decode_set import SteadyRows
from nanoengine.messages import TokenColumns
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, Sequence
from nanoengine.step import PREVIOUS_SAMPLE, SequenceState, StepOutput, TokenLists
from tests.nanoengine.scheduler_driver import EOS, Driver, expected_output, invented_token, prompt_of

OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(0, 2), st.integers(1, 30), st.integers(0, 20)),
        st.tuples(st.just("abort"), st.integers(0, 20)),
        st.tuples(st.just("step"), st.integers(1, 8)),
        st.tuples(st.just("epoch")),
    ),
    max_size=40,
)


def play(operations: list[tuple], steady: bool, async_scheduling: bool, **limits: Any) -> Driver:
    """The operations, then to the end; without `steady` every decode is scheduled as a row of its own."""
    driver = Driver(async_scheduling, **limits)
    driver.scheduler._may_be_steady &= steady
    names = 0
    for operation in operations:
        match operation:
            case ("add", length, salt, max_tokens, stop_at):
                prompt = prompt_of(length, salt)
                stops = expected_output(prompt, max_tokens)[stop_at : stop_at + 1]
                driver.add(f"r{names}", prompt, max_tokens=max_tokens, stop_token_ids=stops)
                names += 1
            case _:
                driver.perform(operation)
    driver.run()
    return driver


@settings(max_examples=60, deadline=None)
@given(OPERATIONS, st.sampled_from([16, 64]), st.sampled_from([1, 4, 5]), st.booleans(), st.booleans())
def test_steps_are_those_that_single_rows_would_make(
    operations: list[tuple], num_blocks: int, block_size: int, caching: bool, async_scheduling: bool
) -> None:
    """The fast path against its slow twin: the same rows in the same steps, whatever comes and goes."""
    limits = {"num_kv_blocks": num_blocks, "block_size": block_size, "enable_prefix_caching": caching}
    fast = play(operations, True, async_scheduling, **limits)
    slow = play(operations, False, async_scheduling, **limits)
    assert fast.tokens == slow.tokens
    assert fast.finished == slow.finished
    assert [step.rows for step in fast.steps] == [step.rows for step in slow.steps]
    assert [step.finished for step in fast.steps] == [step.finished for step in slow.steps]
    assert not any(len(step.decodes) for step in slow.steps)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_steady_decode_is_no_row_of_its_own_and_comes_as_columns(async_scheduling: bool) -> None:
    driver = Driver(async_scheduling)
    for i in range(4):
        driver.add(f"r{i}", prompt_of(3 + i, i), max_tokens=20)
    driver.step()
    driver.step()
    for _ in range(10):
        step = driver.scheduler.schedule()
        assert step is not None
        assert (len(step.decodes), step.states) == (4, [])
        driver.outputs.append(driver.workers.run(step))
        driver.scheduler.commit(driver.outputs.popleft())
        deltas = driver.scheduler.take_deltas()
        assert [type(entry) for _, entry in deltas.entries] == [TokenColumns]
        assert [item.delta.request_id for item in deltas] == [f"r{i}" for i in range(4)]
        driver.scheduler.outbox._entries += deltas.entries
        driver.receive()
    driver.run()
    assert all(driver.tokens[f"r{i}"] == expected_output(prompt_of(3 + i, i), 20) for i in range(4))


def test_front_ends_are_told_of_their_own_sequences_alone() -> None:
    driver = Driver()
    for i in range(6):
        driver.add(f"r{i}", prompt_of(4, i), client=f"c{i % 2}", max_tokens=10)
    for _ in range(4):
        driver.step()
    step = driver.scheduler.schedule()
    assert step is not None
    driver.scheduler.commit(driver.workers.run(step))
    deltas = driver.scheduler.take_deltas()
    assert [client_id for client_id, _ in deltas.entries] == ["c0", "c1"]
    assert {(item.client_id, item.delta.request_id) for item in deltas} == {(f"c{i % 2}", f"r{i}") for i in range(6)}
    for item in deltas:
        i = int(item.delta.request_id[1:])
        assert [item.delta.start, *item.delta.token_ids] == [4, expected_output(prompt_of(4, i), 5)[4]]


def test_eos_among_steady_decodes_ends_its_own_sequence_alone() -> None:
    driver = Driver()
    for name, ignore_eos in (("a", False), ("b", False), ("ignores", True)):
        driver.add(name, prompt_of(4, len(name)), max_tokens=30, ignore_eos=ignore_eos)
    driver.step()
    driver.step()
    step = driver.scheduler.schedule()
    assert step is not None
    assert len(step.decodes) == 3
    driver.scheduler.commit(StepOutput(step.epoch, step.step_id, step.decodes.seq_ids, [[7], [EOS], [EOS]]))
    driver.scheduler.check_invariants()
    driver.receive()
    assert driver.finished == {"b": "stop"}
    assert [driver.tokens[name][-1] for name in ("a", "b", "ignores")] == [7, EOS, EOS]


def test_row_that_brings_no_token_or_several_is_looked_at_by_itself() -> None:
    driver = Driver()
    for i in range(3):
        driver.add(f"r{i}", prompt_of(4, i), max_tokens=30)
    driver.step()
    step = driver.scheduler.schedule()
    assert step is not None
    assert len(step.decodes) == 3
    known = {name: len(ids) for name, ids in driver.tokens.items()}
    driver.scheduler.steady.leave(driver.scheduler.running[1])
    driver.scheduler.commit(StepOutput(step.epoch, step.step_id, step.decodes.seq_ids, [[7], [8, 9], [10]]))
    driver.receive()
    assert [driver.tokens[f"r{i}"][known[f"r{i}"] :] for i in range(3)] == [[7], [8, 9], [10]]


def test_who_joined_behind_a_step_does_not_publish_what_that_step_did_not_compute() -> None:
    """Both come to a boundary at the same ages; only the one that was in the step has a block to publish."""
    driver = Driver(True, num_kv_blocks=64)
    driver.add("old", prompt_of(6), max_tokens=30)
    for _ in range(4):
        driver.step()
    driver.add("new", prompt_of(8, 1), max_tokens=30)  # two blocks full, computed by the step that is left in flight
    first = driver.outputs.popleft()
    step = driver.scheduler.schedule()
    assert step is not None
    output = driver.workers.run(step)
    driver.scheduler.commit(first)
    (new,) = (seq for seq in driver.scheduler.running if seq.request.request_id == "new")
    assert new.steady is not None
    published = set(driver.scheduler.blocks._block_of.values())
    assert published.isdisjoint(new.block_table)
    driver.scheduler.commit(output)
    driver.run()
    assert driver.tokens["new"] == expected_output(prompt_of(8, 1), 30)


def test_mixed_set_names_tokens_that_are_known_and_leaves_the_others_to_the_workers() -> None:
    """A sequence that had no row in the step in flight must not ask for that step's sample."""
    driver = Driver(True, max_num_batched_tokens=16, max_num_seqs=16)
    driver.add("a", prompt_of(5), max_tokens=40)
    driver.step()
    for i in range(8):
        driver.add(f"r{i}", prompt_of(12, 1 + i), max_tokens=12)
    driver.run()
    assert all(driver.tokens[f"r{i}"] == expected_output(prompt_of(12, 1 + i), 12) for i in range(8))
    tokens = [row.token_ids for step in driver.steps for row in step.decodes.states()]
    assert [PREVIOUS_SAMPLE] in tokens


def test_counters_of_a_steady_decode_cannot_be_set() -> None:
    driver = Driver()
    driver.add("a", prompt_of(4), max_tokens=9)
    driver.step()
    (seq,) = driver.scheduler.running
    assert (seq.num_computed_tokens, seq.num_pending_tokens, seq.num_uncomputed_tokens) == (4, 0, 1)
    with pytest.raises(AssertionError, match="steady"):
        seq.num_computed_tokens = 0
    with pytest.raises(AssertionError, match="steady"):
        seq.num_pending_tokens = 0
    driver.scheduler.steady.leave(seq)
    seq.num_computed_tokens = 4
    driver.run()
    assert driver.tokens["a"] == expected_output(prompt_of(4), 9)


def test_columns_widen_when_numbers_outgrow_them() -> None:
    rows = SteadyRows()
    request = Request("r", [1, 2], SamplingParams())
    for at, seq_id in enumerate((7, 2**31)):
        rows.insert(at, Sequence(seq_id, request, 0, []), -(2**31) - 5 * at)
    assert rows.seq_ids == array("q", [7, 2**31])
    assert rows.starts == array("q", [-(2**31), -(2**31) - 5])
    assert rows.without([0]).seq_ids.tolist() == [2**31]
    assert len(rows) == 2


def test_token_lists_read_like_lists() -> None:
    for rows in ([], [[1], [2]], [[], [5, 6], [2**40]], [[], []]):
        tokens = TokenLists.of(rows)
        assert tokens == rows
        assert len(tokens) == len(rows)
        assert [tokens[i] for i in range(len(rows))] == rows
    assert TokenLists.of([[1], [2, 3]]).singles(1) == [1]
    assert TokenLists.of([[1], [2, 3]]).singles(2) is None


def test_rows_can_be_read_whatever_their_form() -> None:
    driver = Driver()
    driver.add("a", prompt_of(4), max_tokens=9)
    driver.step()
    driver.add("b", prompt_of(3, 1))
    step = driver.step()
    assert step is not None
    last = invented_token(prompt_of(4))
    assert step.rows[0] == SequenceState(1, [last], 4, [step.rows[0].new_block_ids[0]], True)
    assert step.rows[1].token_ids == prompt_of(3, 1)
    assert step.num_rows == 2
