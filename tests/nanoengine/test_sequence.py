"""Requests and sequences alone."""

from __future__ import annotations

from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, Sequence, SequenceStatus


def make_request() -> Request:
    request = Request("r", [1, 2, 3], SamplingParams())
    request.seqs = [Sequence(i, request, i, []) for i in range(2)]
    return request


def test_fork_shares_nothing_that_may_change() -> None:
    parent = make_request().seqs[0]
    parent.append_token(4)
    parent.block_table.append(7)
    parent.block_hashes.append(b"h")
    child = parent.fork(9, 1)
    assert (child.seq_id, child.index, child.token_ids, child.block_table) == (9, 1, [1, 2, 3, 4], [7])
    child.append_token(5)
    child.block_table.append(8)
    child.block_hashes.append(b"i")
    assert (parent.token_ids, parent.block_table, parent.block_hashes) == ([1, 2, 3, 4], [7], [b"h"])
    assert child.num_sent_blocks is None, "the workers know nothing of the child yet"


def test_request_is_finished_only_when_every_sequence_is() -> None:
    request = make_request()
    assert not request.is_finished()
    request.seqs[0].status = SequenceStatus.FINISHED_STOPPED
    assert not request.is_finished()
    assert request.get_seqs(SequenceStatus.WAITING) == [request.seqs[1]]
    request.seqs[1].status = SequenceStatus.FINISHED_ABORTED
    assert request.is_finished()
    assert len(request.get_seqs()) == 2


def test_every_status_maps_to_a_finish_reason_that_clients_know() -> None:
    reasons = {status: status.finish_reason for status in SequenceStatus}
    assert {reasons[s] for s in SequenceStatus if s.is_finished} == {"stop", "length", "abort", "error"}
    assert all(reasons[s] is None for s in SequenceStatus if not s.is_finished)


def test_counters_follow_the_tokens() -> None:
    seq = make_request().seqs[0]
    assert (seq.num_prompt_tokens, seq.num_completion_tokens, seq.num_uncomputed_tokens) == (3, 0, 3)
    seq.num_computed_tokens = 3
    seq.append_token(4)
    assert (seq.num_tokens, seq.num_completion_tokens, seq.num_uncomputed_tokens) == (4, 1, 1)
    assert seq.completion_token_ids == [4]
