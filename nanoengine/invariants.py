"""What must hold of a scheduler between two steps; it looks, and changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoengine.beam_group import BeamGroup, is_parked
from nanoengine.sequence import Request, SequenceStatus

if TYPE_CHECKING:
    from nanoengine.scheduler import Scheduler


def check_invariants(scheduler: Scheduler) -> None:
    """Raise AssertionError unless queues, requests and blocks agree."""
    queued = [*scheduler.waiting, *scheduler.running]
    assert len({seq.seq_id for seq in queued}) == len(queued), "a sequence stands in two places"
    live = [seq for request in scheduler.requests.values() for seq in request.seqs if not seq.is_finished]
    unparked = {seq.seq_id for seq in live if not is_parked(seq)}
    assert unparked == {seq.seq_id for seq in queued}, "a live sequence stands in no queue"
    assert all(request.get_seqs() and not request.is_finished() for request in scheduler.requests.values())
    for request in scheduler.requests.values():
        if request.beams is not None:
            _check_search(request, request.beams)
    blocks = scheduler.blocks
    for seq in scheduler.waiting:
        assert seq.status in (SequenceStatus.WAITING, SequenceStatus.SWAPPED), f"{seq} waits"
        assert not seq.block_table, f"{seq} waits and holds blocks"
        assert (seq.num_computed_tokens > 0) == (seq.status is SequenceStatus.SWAPPED), f"{seq} waits"
        assert len(seq.host_blocks) == blocks.blocks_for(seq.num_computed_tokens), f"{seq} waits and lost blocks"
        assert seq.num_sent_blocks is None, f"{seq} waits and the workers know it"
    for seq in scheduler.running:
        assert seq.status is SequenceStatus.RUNNING, f"{seq} runs"
        assert seq.num_computed_tokens <= len(seq.block_table) * scheduler.limits.block_size, (
            f"{seq} outgrew its blocks"
        )
        assert seq.num_uncomputed_tokens >= 0, f"{seq} computed more than it has"
    sampling = [seq for flight in scheduler.in_flight for seq in flight.sampled()]
    for seq in queued:
        assert seq.num_pending_tokens == sampling.count(seq), f"{seq} waits for tokens that no step samples"
    for seq in queued:
        if seq.prompt_log is not None and not seq.prompt_log.is_complete:
            starts = [record.start for flight in scheduler.in_flight for record in flight.records if record.seq is seq]
            computed = min(starts, default=seq.num_computed_tokens)
            assert computed <= seq.prompt_log.end, f"{seq} passed over what it is to tell of"
    assert len(scheduler.running) <= scheduler.limits.max_num_seqs
    steady = {seq.seq_id for seq in queued if seq.steady is not None}
    assert steady <= {seq.seq_id for seq in scheduler.running}, "a steady decode does not run"
    assert len(steady) == len(scheduler.steady), "somebody who does not run is a steady decode"
    scheduler.steady.check_invariants()
    if not queued:
        assert blocks.num_free_blocks == scheduler.limits.num_kv_blocks, "a block is held by nobody"
        assert blocks.host.num_free_blocks == scheduler.limits.num_host_blocks, "a host block is held by nobody"
    blocks.check_invariants(live)


def _check_search(request: Request, group: BeamGroup) -> None:
    """The beams of a search are equally long, and not all of them rest."""
    beams = group.search.beams
    assert not group.search.is_over, "a search is over and its client was not told"
    assert len(request.seqs) == len(beams), "sequences and beams differ"
    for seq, beam in zip(request.seqs, beams, strict=True):
        assert seq.completion_token_ids == [each.token_id for each in beam.path()], f"{seq} is not its beam"
        assert seq.steady is None, f"{seq} is scheduled ahead of its search"
        assert seq not in group.told or seq.num_pending_tokens == 0, f"{seq} rests and is computed"
        assert not is_parked(seq) or not seq.block_table, f"{seq} holds blocks and stands in no queue"
    assert group.told.keys() < set(request.seqs), "a search does not go on"
