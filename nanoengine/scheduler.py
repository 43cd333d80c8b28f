"""Decides what each step computes: continuous batching under one token budget; knows no process, socket or tensor.

A step mixes decodes and prefill chunks. Decodes come first, then the prompts that are under way, then new ones, so
a long prompt cannot stop a stream. When blocks run out, the running sequence that is last in the policy's order (the
newest, under fcfs) is preempted: its blocks are freed, and it is computed again later, or swapped to the host and
back where that is asked for and the host has room; the first always progresses.

Two steps may be in flight, collected in order (`commit`): while the workers compute step k, step k + 1 is scheduled.
A sequence that step k samples is given its next row before that token is known; the row says PREVIOUS_SAMPLE. A
length that will be reached is known ahead, so nothing is scheduled beyond it; a stop token is not, so the row that
was scheduled behind one is discarded. Blocks that go from one sequence to another meanwhile are safe: the workers
take the steps in order, and a block is published only for tokens that are known.

Requests are added and aborted between steps only.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable

from configs.errors import RequestError, RequestTimeoutError, from_wire, to_wire
from nanoengine.admission import SchedulerLimits, check_admissible, reserved_blocks, serving_order
from nanoengine.beam_group import begin_search, end_search, is_parked, make_way, take_told
from nanoengine.block_manager import BlockManager
from nanoengine.decode_set import DecodeSet, StepInFlight
from nanoengine.engine_stats import StepTotals
from nanoengine.forking import Start, after_siblings, chunk_before_fork, find_start
from nanoengine.invariants import check_invariants
from nanoengine.messages import AddRequest
from nanoengine.outbox import ClientDeltas, Outbox
from nanoengine.row_params import row_extras, row_params
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, ScheduledRow, Sequence, SequenceStatus
from nanoengine.starting_over import forget_computation
from nanoengine.step import PREVIOUS_SAMPLE, DecodeRows, Epoch, SequenceState, StepInput, StepOutput, TokenLogprobs
from nanoengine.step_batch import StepBatch
from nanoengine.step_cap import StepCap
from nanoengine.step_costs import StepCosts

__all__ = ["Scheduler", "SchedulerLimits"]

logger = logging.getLogger(__name__)

# How many requests that wait for a prefix are passed over in search of one that does not.
MAX_PASSED = 16


class Scheduler:
    """Owns every sequence and the block tables of one worker group."""

    def __init__(self, limits: SchedulerLimits, epoch: Epoch, clock: Callable[[], float] = time.time) -> None:
        """`clock` gives seconds on the scale of `AddRequest.arrival_time`."""
        self.limits = limits
        self.clock = clock
        self.epoch = epoch
        self.blocks = BlockManager(
            limits.num_kv_blocks, limits.block_size, limits.enable_prefix_caching, limits.num_host_blocks
        )
        self._order = serving_order(limits.policy)
        self.waiting: list[Sequence] = []  # both in serving order
        self.running: list[Sequence] = []
        self.requests: dict[tuple[str, str], Request] = {}
        self.trial: Request | None = None  # while it is set, no other request begins to run (see `recovery`)
        self.num_preemptions = self.num_swaps = 0  # of all preemptions, those by swapping
        self.totals = StepTotals()
        self.num_searches = 0  # beam searches among them
        self.seq_ids = itertools.count(1)
        self.step_id = 0
        self.in_flight: deque[StepInFlight] = deque()
        self.steady = DecodeSet(limits.block_size, limits.max_model_len, self._order)  # part of `running`
        # Members take every step together, so there must be budget for all of them, always.
        self._may_be_steady = limits.max_num_batched_tokens >= limits.max_num_seqs
        self._costs = StepCosts(limits.max_decode_gap if limits.enable_chunked_prefill else 0)
        self.cap = StepCap(limits)
        self._deadlines: list[tuple[float, tuple[str, str]]] = []  # a heap of (time, request key)
        self.dropped: list[int] = []  # seq_ids that the workers need not keep any longer
        self.outbox = Outbox(clock)

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Queue a request. One that is known already gets its tokens behind the journal again: adding is idempotent.

        What can never be served is answered with an error delta, and harms nobody else.
        """
        known = self.requests.get((message.client_id, message.request_id))
        if known is not None:
            if known.beams is None:  # nothing was told of a search yet
                self._replay(known, message)
            return
        try:
            params = SamplingParams.from_dict(message.params)
            beams = begin_search(message, self.limits)
            check_admissible(message, self.limits)
        except RequestError as error:
            self.outbox.refuse(message, error)
            return
        request = Request.of(message, params, beams)
        self.num_searches += beams is not None
        self.requests[request.key] = request
        if message.timeout is not None:
            heapq.heappush(self._deadlines, (message.arrival_time + message.timeout, request.key))
        for index in range(request.best_of if beams is None else 1):
            journal = message.journal[index] if beams is None and index < len(message.journal) else []
            request.seqs.append(Sequence(next(self.seq_ids), request, index, journal))
            self.enqueue(request.seqs[-1])
        for seq in request.seqs:
            if seq.num_completion_tokens and self._stop_status(seq):
                # The journal was complete already; only the last word got lost.
                self._finish(seq, self._stop_status(seq), start=seq.num_completion_tokens)

    def enqueue(self, seq: Sequence) -> None:
        """Let a sequence wait for its turn."""
        seq.status = SequenceStatus.SWAPPED if seq.host_blocks else SequenceStatus.WAITING
        if not is_parked(seq):
            bisect.insort(self.waiting, seq, key=self._order)

    def _replay(self, request: Request, message: AddRequest) -> None:
        for seq in request.seqs:
            start = len(message.journal[seq.index]) if seq.index < len(message.journal) else 0
            if seq.prompt_log is not None:
                self.outbox.emit_prompt(seq, seq.prompt_log.since(message.num_prompt_logprobs))
            self.outbox.emit(seq, start)

    def abort(self, client_id: str, request_id: str, index: int | None = None) -> None:
        """End one sequence of a request, or all (index None). An unknown or finished one is ignored."""
        request = self.requests.get((client_id, request_id))
        if request is None:
            return
        if request.beams is not None:
            index = request.beams.abandon(index)
        for seq in request.seqs:
            if not seq.is_finished and index in (None, seq.index):
                self._finish(seq, SequenceStatus.FINISHED_ABORTED, start=seq.num_completion_tokens)

    def abort_client(self, client_id: str) -> None:
        """End every request of a front end that vanished."""
        for key in [key for key in self.requests if key[0] == client_id]:
            self.abort(*key)

    def fail_all(self, error: BaseException) -> None:
        """End every request with an error: the engine can serve no more."""
        for request in list(self.requests.values()):
            self.fail(request, error)

    def expire(self) -> None:
        """End each request whose deadline has passed with an error; call it between steps."""
        while self._deadlines and self._deadlines[0][0] <= self.clock():
            deadline, key = heapq.heappop(self._deadlines)
            request = self.requests.get(key)
            if request is not None:
                seconds = deadline - request.arrival_time
                self.fail(request, RequestTimeoutError(f"the request was not complete within {seconds:g} s"))

    def fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error."""
        for seq in request.seqs:
            if not seq.is_finished:
                seq.error = to_wire(error)
                self._finish(seq, SequenceStatus.FINISHED_ERROR, start=seq.num_completion_tokens)

    # -- a step -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may have something to give."""
        return bool(self.waiting or self.running)

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not committed."""
        return len(self.in_flight)

    def schedule(self) -> StepInput | None:
        """Choose the next step's rows and take their blocks; None when there is nothing to compute now.

        With a step in flight None may also mean that its outcome must be known first. At most one may be.
        """
        assert len(self.in_flight) <= 1, "commit() comes before a third schedule()"
        batch = StepBatch(self.limits.max_num_batched_tokens - len(self.steady))
        grown = self._grow_steady(batch)
        if len(self.running) > len(self.steady):
            self._schedule_running(batch)
        self._bound_gap(batch)
        if not batch.preempted:
            self._schedule_waiting(batch)
        copies = self.blocks.take_copies()
        if not batch.rows and not self.steady and not self.dropped and not copies:
            return None
        self.step_id += 1
        flight = StepInFlight(self.step_id, self.steady.age, self.steady.num_left)
        decodes = DecodeRows()
        if self.steady:
            previous = self.in_flight[-1].steady if self.in_flight else None
            flight.steady, decodes = self.steady.step(previous, grown)
        states = [self._row(seq, num_tokens) for seq, num_tokens in batch.rows.items()]
        for seq, row in zip(batch.rows, states, strict=True):
            flight.records.append(
                ScheduledRow(seq, row.num_computed_tokens, len(row.token_ids), row.sample, seq.num_preemptions)
            )
            seq.num_computed_tokens += len(row.token_ids)
            seq.num_pending_tokens += row.sample
            if row.sample and self._may_be_steady:
                self.steady.join(seq)
        self.in_flight.append(flight)
        finished, self.dropped = self.dropped, []
        return StepInput(self.epoch, self.step_id, copies, states, finished, decodes)

    def _grow_steady(self, batch: StepBatch) -> list[Sequence]:
        """Give each steady decode that comes to a block's boundary a new block; returns who got one."""
        due, grown = self.steady.at_boundary(), []
        if self.blocks.can_allocate(len(due)):
            self.blocks.extend(due)
            return due
        for seq in due:
            if seq.steady is None:
                continue  # it had to give way to an older one
            if self._make_room(seq, 1, batch):
                self.blocks.allocate(seq, seq.num_computed_tokens + 1)
                grown.append(seq)
            elif seq.steady is not None:
                self.steady.leave(seq)  # it cannot take this step
                batch.budget += 1
        return grown

    def _schedule_running(self, batch: StepBatch) -> None:
        """Give each running sequence that is no steady decode its next tokens, decodes before prefill chunks."""
        running = [seq for seq in self.running if seq.steady is None]
        left = [(seq, seq.num_uncomputed_tokens) for seq in running if not self._reaches_length(seq)]
        sharers = self.blocks.tail_sharers
        decodes = [pair for pair in left if pair[1] == 1]
        for seq, num_tokens in itertools.chain(decodes, (pair for pair in left if pair[1] > 1)):  # each oldest first
            if batch.budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:
                continue  # it had to give way to an older one
            if num_tokens > 1:
                self._bound_gap(batch)
                if batch.budget == 0:
                    break
                num_tokens = min(chunk_before_fork(seq, num_tokens), batch.budget)
            end = seq.num_computed_tokens + num_tokens
            if end > len(seq.block_table) * self.limits.block_size or seq in sharers:
                if not self._make_room(seq, num_tokens, batch):
                    continue
                self.blocks.allocate(seq, end)
            batch.add(seq, num_tokens)

    def _bound_gap(self, batch: StepBatch) -> None:
        """Before the first prefill chunk goes beside decodes: leave so many tokens that they are not held up."""
        if not batch.bounded and (batch.rows or self.steady):
            limit = self._costs.max_prefill_tokens()
            batch.budget = batch.budget if limit is None else min(batch.budget, limit)
        batch.bounded = True

    def _make_room(self, seq: Sequence, num_tokens: int, batch: StepBatch) -> bool:
        """Preempt the newest sequences until `seq` can grow; it may be the one to go. Says whether it can grow now."""
        end = seq.num_computed_tokens + num_tokens
        while not self.blocks.can_allocate(self.blocks.num_new_blocks(seq, end)):
            batch.preempted = True
            victim = self.running[-1]
            if len(self.running) == 1:
                if seq.num_pending_tokens:
                    return False  # the token that is on its way belongs to the output still
                # Nobody is left to give way: it has outgrown the whole cache.
                named = {"request_id": seq.request.request_id}
                logger.warning("a request ends early: the K/V cache holds no more of it", extra=named)
                self._finish(seq, SequenceStatus.FINISHED_LENGTH_CAPPED, start=seq.num_completion_tokens)
                return False
            batch.budget += victim.steady is not None
            batch.remove(victim)
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def _reaches_length(self, seq: Sequence) -> bool:
        """Whether the tokens on their way are its last ones, whatever they will be."""
        if not seq.num_pending_tokens:
            return False
        return self._is_full(seq, seq.num_pending_tokens)

    def preempt(self, seq: Sequence) -> None:
        """Take its blocks from a running sequence, which is computed again later."""
        self.steady.leave(seq)
        self.running.remove(seq)
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.dropped.append(seq.seq_id)
        if self.limits.preemption_mode == "swap" and self.blocks.swap_out(seq):
            self.num_swaps += 1
        else:
            self.blocks.free(seq)
            seq.forget_computation()
        self.enqueue(seq)

    def _schedule_waiting(self, batch: StepBatch) -> None:
        """Admit waiting sequences in order while budget, rows and blocks last.

        One whose prefix a running sequence is computing just now is passed over until the blocks are there. That
        takes as long as the other's prefill at most, since it leaves the running ones only by giving its blocks back.
        """
        position = num_passed = 0
        while position < len(self.waiting) and num_passed < MAX_PASSED and batch.budget > 0:
            if len(self.running) >= self.limits.max_num_seqs and not make_way(self):
                break
            seq = self.waiting[position]
            if self.trial not in (None, seq.request):
                position += 1
                continue
            if seq.num_pending_tokens:
                break  # preempted while a step samples it: that token comes first
            start = find_start(seq, self.blocks)
            if start is None:
                position, num_passed = after_siblings(self.waiting, position), num_passed + 1
                continue
            uncomputed = seq.num_tokens - start.num_tokens
            if uncomputed > batch.budget and not self.limits.enable_chunked_prefill:
                break
            # All blocks of its tokens are taken at once: several half-prefilled prompts could block each other.
            reserve = reserved_blocks(seq, len(self.running), self.limits)
            if not self.blocks.can_allocate(start.num_new_blocks(seq, self.blocks), start.hits, reserve):
                if make_way(self):
                    continue
                if self.running:
                    break
                # Every block is free and still it does not fit: a new worker group may have fewer than the last.
                self._finish(seq, SequenceStatus.FINISHED_LENGTH_CAPPED, start=seq.num_completion_tokens)
                continue
            del self.waiting[position]
            self._admit(seq, start)
            batch.add(seq, min(chunk_before_fork(seq, uncomputed), batch.budget))

    def _admit(self, seq: Sequence, start: Start) -> None:
        """Let a sequence run that waited, on the blocks that it starts with and on new ones."""
        if start.parent is not None:
            self.blocks.fork(start.parent, seq, start.num_tokens)
        elif seq.status is not SequenceStatus.SWAPPED:
            self.blocks.count_query(seq, len(start.hits))
        self.blocks.allocate(seq, seq.num_tokens, start.hits)
        self.blocks.announce(seq)
        request = seq.request
        if request.first_scheduled_time is None:
            request.first_scheduled_time, request.num_cached_tokens = self.clock(), seq.num_computed_tokens
        self.run(seq)

    def run(self, seq: Sequence) -> None:
        """Let a sequence run that has its blocks and stands in no queue."""
        seq.status = SequenceStatus.RUNNING
        bisect.insort(self.running, seq, key=self._order)

    def _row(self, seq: Sequence, num_tokens: int) -> SequenceState:
        """The row of `seq`: its full state when the workers know nothing of it, else what is new."""
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        new_block_ids = seq.block_table[seq.num_sent_blocks or 0 :]
        # By position: keywords cost a tenth of a step of decodes.
        token_ids = seq.token_ids[start:end] or [PREVIOUS_SAMPLE]
        sample = num_tokens == seq.num_uncomputed_tokens
        row = SequenceState(seq.seq_id, token_ids, start, new_block_ids, sample)
        if seq.num_sent_blocks is None:
            row.params, row.num_prompt_tokens = row_params(seq), seq.num_prompt_tokens
            row.extras = row_extras(seq, self.limits.eos_token_ids)
            if row.extras is not None and row.extras.needs_past:
                # All of it, whatever is cached: a penalty counts the tokens behind a prefix hit too.
                row.past_token_ids = list(seq.token_ids)
        seq.num_sent_blocks = len(seq.block_table)
        return row

    # -- its outcome --------------------------------------------------------------------------------------------

    def commit(self, output: StepOutput) -> None:
        """Take in the output of the oldest step in flight: publish its blocks, append tokens, end what is done.

        An output of an older epoch is dropped, and so is a row whose sequence finished since. One that was preempted
        since lost its blocks, but not the token.
        """
        if output.epoch != self.epoch:
            return
        flight = self.in_flight.popleft()
        assert flight.step_id == output.step_id, f"step {output.step_id} was collected where {flight.step_id} was due"
        self._costs.observe(*self.totals.count_step(flight), output.compute_seconds)
        if self.cap.is_tight:
            self.limits = self.cap.relax(self.limits)
        for row, chunk in output.prompt_logprobs.items():
            seq = flight.seq_of(row)
            if seq.prompt_log is not None and not seq.is_finished:
                self.outbox.emit_prompt(seq, seq.prompt_log.add(chunk))
        for row, error in output.errors.items():
            self.fail(flight.seq_of(row).request, from_wire(error))
        if flight.steady:
            self._commit_steady(flight, output)
        for row, record in enumerate(flight.records, start=len(flight.steady)):
            self._commit_row(record, output, row)

    def _commit_steady(self, flight: StepInFlight, output: StepOutput) -> None:
        """Append a token to each steady decode, all at once but for those that need a look of their own."""
        odd, rows, token_ids = self.steady.take_tokens(flight, output, self.limits.eos_token_ids)
        for seq, num_computed in self.steady.filled(flight.age):
            self.blocks.publish(seq, num_computed - 1, num_computed)
        if token_ids:
            self.totals.num_generated_tokens += len(token_ids)
            self.outbox.emit_columns(rows, flight.age, token_ids)
        for row in odd:
            self._commit_row(flight.record(row), output, row)

    def _commit_row(self, record: ScheduledRow, output: StepOutput, row: int) -> None:
        seq = record.seq
        if record.sample and seq.steady is None:
            seq.num_pending_tokens -= 1
        if seq.is_finished:
            return
        if seq.num_preemptions == record.num_preemptions:
            self.blocks.publish(seq, record.start, record.start + record.num_tokens)
        if record.sample:
            self._append(seq, output.tokens[row], output.logprobs.get(row, []))

    def _append(self, seq: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs]) -> None:
        if seq.request.beams is not None:
            take_told(self, seq, logprobs[-1])
            return
        start = seq.num_completion_tokens
        for token_id, token_logprobs in itertools.zip_longest(token_ids, logprobs):
            seq.append_token(token_id, token_logprobs)
            self.totals.num_generated_tokens += 1
            status = self._stop_status(seq)
            if status is not None:
                self._finish(seq, status, start)
                return
        self.outbox.emit(seq, start)

    def _stop_status(self, seq: Sequence) -> SequenceStatus | None:
        """Whether the newest token ends the sequence, and how."""
        params, token_id = seq.request.sampling_params, seq.token_ids[-1]
        if token_id in self.limits.eos_token_ids and not seq.request.ignores_eos:
            return SequenceStatus.FINISHED_STOPPED
        if token_id in (params.stop_token_ids or ()):
            seq.stop_reason = token_id
            return SequenceStatus.FINISHED_STOPPED
        return SequenceStatus.FINISHED_LENGTH_CAPPED if self._is_full(seq) else None

    def _is_full(self, seq: Sequence, num_more: int = 0) -> bool:
        """Whether `num_more` further tokens bring the sequence to max_tokens or max_model_len."""
        return seq.num_tokens + num_more >= seq.max_num_tokens(self.limits.max_model_len)

    def _finish(self, seq: Sequence, status: SequenceStatus | None, start: int) -> None:
        """End a sequence in whatever queue it stands, free its blocks and tell its client."""
        assert status is not None
        assert status.is_finished
        if seq.request.beams is not None:
            end_search(self, seq.request, status)
            return
        self.leave(seq, status)
        self.outbox.emit(seq, start)
        if seq.request.is_finished():
            del self.requests[seq.request.key]

    def leave(self, seq: Sequence, status: SequenceStatus) -> None:
        """Take a sequence out of whatever queue it stands in, for good, and free its blocks."""
        if seq.status is SequenceStatus.RUNNING:
            self.steady.leave(seq)
            self.running.remove(seq)
        elif not is_parked(seq):
            self.waiting.remove(seq)
        if seq.num_sent_blocks is not None:
            self.dropped.append(seq.seq_id)
        self.blocks.free(seq)
        seq.status = status

    def take_deltas(self) -> ClientDeltas:
        """What the front ends have to be told since the last call, in order."""
        return self.outbox.take()

    # -- recovery and checks ------------------------------------------------------------------------------------

    def new_epoch(self, epoch: Epoch, num_kv_blocks: int, num_host_blocks: int = 0) -> None:
        """Start over with a fresh worker group: its cache is empty, so every sequence is computed again."""
        self.epoch, self.step_id = epoch, 0
        self.limits = dataclasses.replace(self.limits, num_kv_blocks=num_kv_blocks, num_host_blocks=num_host_blocks)
        forget_computation(self)

    def give_up_steps(self, step_id: int) -> None:
        """The ranks found no memory for that step and forgot every row: start over, in smaller steps for a while."""
        for flight in self.in_flight:
            if flight.step_id == step_id:
                self.limits = self.cap.shrink(self.limits, flight.num_tokens, flight.num_rows)
        forget_computation(self)

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, requests and blocks agree."""
        check_invariants(self)
