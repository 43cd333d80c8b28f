"""Runs a beam search on sequences: each beam is a sequence of its request, and this says which of them go on.

A beam is scheduled like any sequence, but never ahead: what follows it is known only when the workers have told the
likeliest tokens behind every beam. Until its siblings are that far it rests: it keeps its blocks, and loses them
without harm when they are needed, since there is nothing to compute of it (resting and without blocks it stands in
no queue). Then the search chooses (`nanoengine.beam_search`): the first beam that a parent lives on in keeps the
parent's sequence, further ones fork it, and parents without any leave.

Clients are told at the end, the best output first. It knows the queues of the scheduler that it is handed, and how a
sequence leaves and enters them; it knows no step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanoengine.admission import SchedulerLimits
from nanoengine.beam_params import BeamSearchParams
from nanoengine.beam_search import BeamSearch, Hypothesis, check_width
from nanoengine.messages import AddRequest
from nanoengine.sequence import Request, Sequence, SequenceStatus
from nanoengine.step import TokenLogprobs

if TYPE_CHECKING:
    from nanoengine.scheduler import Scheduler


class BeamGroup:
    """What there is to a beam search beside its sequences, which are `Request.seqs` in the order of `search.beams`.

    Attributes:
        told: what the workers told of the beams that rest.
        unwanted: indexes of the outputs that the client no longer waits for.
        num_preemptions: of the sequences that have left.
    """

    __slots__ = ("num_preemptions", "search", "told", "unwanted")

    def __init__(self, search: BeamSearch) -> None:
        self.search = search
        self.told: dict[Sequence, TokenLogprobs] = {}
        self.unwanted: set[int] = set()
        self.num_preemptions = 0

    def abandon(self, index: int | None) -> int | None:
        """The client waits no longer for this output, or (None) for any. None when it waits for none, else -1."""
        width = self.search.params.beam_width
        self.unwanted |= set(range(width)) if index is None else {index}
        return None if self.unwanted.issuperset(range(width)) else -1


def begin_search(message: AddRequest, limits: SchedulerLimits) -> BeamGroup | None:
    """The search that a request asks for, if it asks for one. Raises RequestError when it cannot be done."""
    if message.beam_search is None:
        return None
    params = BeamSearchParams.from_dict(message.beam_search)
    check_width(params, limits.eos_token_ids, limits.vocab_size)
    room = limits.max_model_len - len(message.prompt_token_ids)
    max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    return BeamGroup(BeamSearch(params, max_tokens, limits.eos_token_ids))


def is_parked(seq: Sequence) -> bool:
    """Whether it is a beam that rests without blocks, hence stands in no queue."""
    group = seq.request.beams
    return group is not None and seq.status is not SequenceStatus.RUNNING and seq in group.told


def take_told(scheduler: Scheduler, seq: Sequence, told: TokenLogprobs) -> None:
    """The workers told which tokens may follow this beam: it rests, or with the last one the search goes on."""
    request = seq.request
    group = request.beams
    assert group is not None
    if seq.status is not SequenceStatus.RUNNING:  # preempted since it was computed, which is no matter now
        scheduler.waiting.remove(seq)
    group.told[seq] = told
    if len(group.told) < len(request.seqs):
        return
    parents = request.seqs
    chosen = group.search.advance([group.told[parent] for parent in parents])
    if group.search.is_over:
        end_search(scheduler, request)
        return
    heirs = {parents[each.parent] for each in chosen}
    for parent in parents:
        if parent not in heirs:  # before anybody forks: it makes room
            group.num_preemptions += parent.num_preemptions
            scheduler.leave(parent, SequenceStatus.FINISHED_IGNORED)
    children: list[Sequence] = []
    for parent in (parents[each.parent] for each in chosen):
        if parent in heirs:
            heirs.remove(parent)
            children.append(parent)
        else:
            children.append(_fork(scheduler, parent))
    group.told.clear()
    request.seqs = children
    for child, (_, token_id) in zip(children, chosen, strict=True):
        child.append_token(token_id)
        if child.status is not SequenceStatus.RUNNING:
            scheduler.enqueue(child)


def _fork(scheduler: Scheduler, parent: Sequence) -> Sequence:
    """A beam with the same past: on the same blocks if the parent runs and a row is left, else to be computed."""
    child = parent.fork(next(scheduler.seq_ids), parent.index)
    child.forget_computation()
    child.block_table = []
    child.status = SequenceStatus.WAITING
    if parent.status is SequenceStatus.RUNNING and len(scheduler.running) < scheduler.limits.max_num_seqs:
        scheduler.blocks.fork(parent, child)
        scheduler.run(child)
    return child


def make_way(scheduler: Scheduler) -> bool:
    """Take row and blocks from the last beam that rests for a sibling which is queued; says whether there was one.

    Such a sibling may stand behind whoever wants the room, and would wait for ever if its siblings kept theirs.
    """
    if not scheduler.num_searches:
        return False
    for seq in reversed(scheduler.running):
        group = seq.request.beams
        if group is not None and seq in group.told and any(_is_queued(each) for each in seq.request.seqs):
            scheduler.preempt(seq)
            return True
    return False


def _is_queued(seq: Sequence) -> bool:
    return seq.status is not SequenceStatus.RUNNING and not is_parked(seq)


def end_search(scheduler: Scheduler, request: Request, status: SequenceStatus | None = None) -> None:
    """Free the beams and tell the client every output.

    Args:
        status: why it ends early: aborted or failed, which leaves no output; or because the cache holds no more of a
            beam, and then the beams end where they are. None when the search itself came to its end.
    """
    group = request.beams
    assert group is not None
    error = next((seq.error for seq in request.seqs if seq.error), None)
    group.num_preemptions += sum(seq.num_preemptions for seq in request.seqs)
    for seq in request.seqs:
        scheduler.leave(seq, status or SequenceStatus.FINISHED_IGNORED)
    group.told.clear()
    if status is SequenceStatus.FINISHED_LENGTH_CAPPED:
        group.search.stop()
    failed = status in (SequenceStatus.FINISHED_ABORTED, SequenceStatus.FINISHED_ERROR)
    hypotheses: list[Hypothesis | None] = [] if failed else [*group.search.hypotheses]
    # There are fewer than asked for only where not even the first beams could be computed.
    hypotheses += [None] * (group.search.params.beam_width - len(hypotheses))
    request.seqs = []
    for index, hypothesis in enumerate(hypotheses):
        output = _output(scheduler, request, index, hypothesis)
        if hypothesis is None:
            output.status, output.error = status or SequenceStatus.FINISHED_LENGTH_CAPPED, error
        request.seqs.append(output)
    request.seqs[0].num_preemptions = group.num_preemptions
    for output in request.seqs:
        scheduler.outbox.emit(output, 0)
    del scheduler.requests[request.key]
    scheduler.num_searches -= 1


def _output(scheduler: Scheduler, request: Request, index: int, hypothesis: Hypothesis | None) -> Sequence:
    """A finished sequence of a hypothesis' tokens, for the client."""
    beams = [] if hypothesis is None else hypothesis.beam.path()
    output = Sequence(next(scheduler.seq_ids), request, index, [beam.token_id for beam in beams])
    output.logprobs = [beam.logprobs for beam in beams]
    if hypothesis is not None and hypothesis.stopped:
        output.status = SequenceStatus.FINISHED_STOPPED
    else:
        output.status = SequenceStatus.FINISHED_LENGTH_CAPPED
    return output
