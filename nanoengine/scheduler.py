"""Decides what each step computes: continuous batching under one token budget; knows no process, socket or tensor.

A step mixes decodes and prefill chunks. Decodes come first, then the prompts that are under way, then new ones, so
a long prompt cannot stop a stream. When blocks run out, the newest running sequence is preempted: its blocks are
freed and it is computed again later; the oldest always progresses.

Two steps may be in flight, collected in order (`commit`). Requests are added and aborted between steps only.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections import deque
from typing import NamedTuple

from configs.errors import RequestError, to_wire
from nanoengine.block_manager import BlockManager
from nanoengine.messages import AddRequest, TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.sequence import Request, ScheduledRow, Sequence, SequenceStatus
from nanoengine.step import Epoch, RowParams, SequenceState, StepInput, StepOutput

logger = logging.getLogger(__name__)

# Share of the blocks that admission leaves free, so that the sequences which run already can grow a little before
# somebody must be preempted.
WATERMARK = 0.01


@dataclasses.dataclass(frozen=True)
class SchedulerLimits:
    """What the scheduler must respect, gathered from the settings and from what the workers reported."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    eos_token_ids: frozenset[int] = frozenset()
    vocab_size: int = 2**63
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True


class ClientDelta(NamedTuple):
    """A delta and the front end it is for."""

    client_id: str
    delta: TokenDelta


class Scheduler:
    """Owns every sequence and the block tables of one worker group."""

    def __init__(self, limits: SchedulerLimits, epoch: Epoch) -> None:
        self.limits = limits
        self.epoch = epoch
        self.blocks = BlockManager(limits.num_kv_blocks, limits.block_size, limits.enable_prefix_caching)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest admission first
        self.requests: dict[tuple[str, str], Request] = {}
        self.num_preemptions = 0
        self._seq_ids = itertools.count(1)
        self._step_id = 0
        self._in_flight: deque[tuple[int, list[ScheduledRow]]] = deque()
        self._dropped: list[int] = []  # seq_ids that the workers need not keep any longer
        self._outbox: list[ClientDelta] = []
        self._watermark = max(1, int(WATERMARK * limits.num_kv_blocks)) if limits.num_kv_blocks > 1 else 0

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, message: AddRequest) -> None:
        """Queue a request. One that is known already gets its tokens behind the journal again: adding is idempotent.

        What can never be served is answered with an error delta, and harms nobody else.
        """
        known = self.requests.get((message.client_id, message.request_id))
        if known is not None:
            self._replay(known, message.journal)
            return
        try:
            params = SamplingParams.from_dict(message.params)
            self._check_admissible(message)
        except RequestError as error:
            delta = TokenDelta(message.request_id, 0, 0, [], finish_reason="error", error=to_wire(error))
            self._outbox.append(ClientDelta(message.client_id, delta))
            return
        request = Request(
            message.request_id,
            message.prompt_token_ids,
            params,
            client_id=message.client_id,
            arrival_time=message.arrival_time,
            priority=message.priority,
            seed=message.seed,
        )
        self.requests[request.key] = request
        for index in range(params.n):
            journal = message.journal[index] if index < len(message.journal) else []
            seq = Sequence(next(self._seq_ids), request, index, journal)
            request.seqs.append(seq)
            self.waiting.append(seq)
            if journal and self._stop_status(seq):
                # The journal was complete already; only the last word got lost.
                self._finish(seq, self._stop_status(seq), start=seq.num_completion_tokens)

    def _check_admissible(self, message: AddRequest) -> None:
        limits, prompt = self.limits, message.prompt_token_ids
        if not prompt:
            raise RequestError("the prompt must hold at least 1 token, got none", "prompt")
        if len(prompt) >= limits.max_model_len:
            raise RequestError(
                f"the prompt must be at most {limits.max_model_len - 1} tokens long (max_model_len "
                f"{limits.max_model_len} less one to generate), got {len(prompt)}",
                "prompt",
                "context_length_exceeded",
            )
        capacity = limits.num_kv_blocks * limits.block_size
        longest = len(prompt) + max(map(len, message.journal), default=0) + 1
        if longest > capacity:
            raise RequestError(
                f"prompt and first output of {longest} tokens can never fit the K/V cache of {capacity} tokens "
                f"({limits.num_kv_blocks} blocks of {limits.block_size})",
                "prompt",
                "context_length_exceeded",
            )
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < limits.vocab_size)
            raise RequestError(f"token ids must be from 0 to {limits.vocab_size - 1}, got {wrong}", "prompt")

    def _replay(self, request: Request, journal: list[list[int]]) -> None:
        for seq in request.seqs:
            start = len(journal[seq.index]) if seq.index < len(journal) else 0
            self._emit(seq, start)

    def abort(self, client_id: str, request_id: str, index: int | None = None) -> None:
        """End one sequence of a request, or all (index None). An unknown or finished one is ignored."""
        request = self.requests.get((client_id, request_id))
        if request is None:
            return
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
        return len(self._in_flight)

    def schedule(self) -> StepInput | None:
        """Choose the next step's rows and take their blocks; None when there is nothing to compute now."""
        scheduled = _Batch(self.limits.max_num_batched_tokens)
        preempted = self._schedule_running(scheduled)
        if not preempted:
            self._schedule_waiting(scheduled)
        if not scheduled.rows and not self._dropped:
            return None
        self._step_id += 1
        rows = [self._row(seq, num_tokens) for seq, num_tokens in scheduled.rows.items()]
        records = [
            ScheduledRow(seq, row.num_computed_tokens, len(row.token_ids), row.sample, seq.num_preemptions)
            for seq, row in zip(scheduled.rows, rows, strict=True)
        ]
        for seq, num_tokens in scheduled.rows.items():
            seq.num_computed_tokens += num_tokens
        self._in_flight.append((self._step_id, records))
        finished, self._dropped = self._dropped, []
        return StepInput(self.epoch, self._step_id, [], rows, finished)

    def _schedule_running(self, batch: _Batch) -> bool:
        """Give each running sequence its next tokens, decodes before prefill chunks; says whether any was preempted."""
        preempted = False
        left = [(seq, seq.num_uncomputed_tokens) for seq in self.running]
        decodes = [pair for pair in left if pair[1] == 1]
        for seq, num_tokens in itertools.chain(decodes, (pair for pair in left if pair[1] > 1)):  # each oldest first
            if batch.budget == 0:
                break
            if seq.status is not SequenceStatus.RUNNING:
                continue  # it had to give way to an older one
            num_tokens = min(num_tokens, batch.budget)
            end = seq.num_computed_tokens + num_tokens
            if end > len(seq.block_table) * self.limits.block_size:
                preempted |= self._make_room(seq, num_tokens, batch)
                if seq.status is not SequenceStatus.RUNNING:
                    continue
                self.blocks.allocate(seq, end)
            batch.add(seq, num_tokens)
        return preempted

    def _make_room(self, seq: Sequence, num_tokens: int, batch: _Batch) -> bool:
        """Preempt the newest sequences until `seq` can grow; it may be the one to go. Says whether any went."""
        needed = self.blocks.blocks_for(seq.num_computed_tokens + num_tokens) - len(seq.block_table)
        went = False
        while not self.blocks.can_allocate(needed):
            victim = self.running[-1]
            if len(self.running) == 1:
                # Nobody is left to give way: it has outgrown the whole cache.
                logger.warning("request %s ends early: the K/V cache holds no more of it", seq.request.request_id)
                self._finish(seq, SequenceStatus.FINISHED_LENGTH_CAPPED, start=seq.num_completion_tokens)
                return True
            batch.remove(victim)
            self._preempt(victim)
            went = True
            if victim is seq:
                break
        return went

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.blocks.free(seq)
        seq.forget_computation()
        seq.status = SequenceStatus.WAITING
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self._dropped.append(seq.seq_id)
        self.waiting.appendleft(seq)

    def _schedule_waiting(self, batch: _Batch) -> None:
        """Admit waiting sequences in order while budget, rows and blocks last."""
        while self.waiting and batch.budget > 0 and len(self.running) < self.limits.max_num_seqs:
            seq = self.waiting[0]
            hits = self.blocks.match_prefix(seq)
            uncomputed = seq.num_tokens - len(hits) * self.limits.block_size
            if uncomputed > batch.budget and not self.limits.enable_chunked_prefill:
                break
            # All blocks of its tokens are taken at once: several half-prefilled prompts could block each other.
            num_new = self.blocks.blocks_for(seq.num_tokens) - len(hits)
            if not self.blocks.can_allocate(num_new, hits, self._watermark if self.running else 0):
                if self.running:
                    break
                # Every block is free and still it does not fit: a new worker group may have fewer than the last.
                self._finish(seq, SequenceStatus.FINISHED_LENGTH_CAPPED, start=seq.num_completion_tokens)
                continue
            self.waiting.popleft()
            self.blocks.allocate(seq, seq.num_tokens, hits)
            self.blocks.count_query(seq, len(hits))
            if seq.num_preemptions == 0:
                seq.num_cached_tokens = seq.num_computed_tokens
            if seq.request.first_scheduled_time is None:
                seq.request.first_scheduled_time = time.time()
            seq.status = SequenceStatus.RUNNING
            self.running.append(seq)
            batch.add(seq, min(seq.num_uncomputed_tokens, batch.budget))

    def _row(self, seq: Sequence, num_tokens: int) -> SequenceState:
        """The row of `seq`: its full state when the workers know nothing of it, else what is new."""
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        new_block_ids = seq.block_table[seq.num_sent_blocks or 0 :]
        # By position: keywords cost a tenth of a step of decodes.
        row = SequenceState(seq.seq_id, seq.token_ids[start:end], start, new_block_ids, end == len(seq.token_ids))
        if seq.num_sent_blocks is None:
            row.params, row.num_prompt_tokens = _row_params(seq), seq.num_prompt_tokens
        seq.num_sent_blocks = len(seq.block_table)
        return row

    # -- its outcome --------------------------------------------------------------------------------------------

    def commit(self, output: StepOutput) -> None:
        """Take in the output of the oldest step in flight: publish its blocks, append tokens, end what is done.

        An output of an older epoch is dropped; a row whose sequence finished or was preempted since is discarded.
        """
        if output.epoch != self.epoch:
            return
        step_id, records = self._in_flight.popleft()
        assert step_id == output.step_id, f"step {output.step_id} was collected where {step_id} was due"
        for record, token_ids in zip(records, output.token_ids, strict=True):
            seq = record.seq
            # One that runs again after a preemption counts one more than its record.
            if seq.status is not SequenceStatus.RUNNING or seq.num_preemptions != record.num_preemptions:
                continue
            self.blocks.publish(seq, record.start, record.start + record.num_tokens)
            if record.sample:
                self._append(seq, token_ids)

    def _append(self, seq: Sequence, token_ids: list[int]) -> None:
        start = seq.num_completion_tokens
        for token_id in token_ids:
            seq.token_ids.append(token_id)
            status = self._stop_status(seq)
            if status is not None:
                self._finish(seq, status, start)
                return
        self._emit(seq, start)

    def _stop_status(self, seq: Sequence) -> SequenceStatus | None:
        """Whether the newest token ends the sequence, and how."""
        params, token_id = seq.request.sampling_params, seq.token_ids[-1]
        if token_id in self.limits.eos_token_ids and not params.ignore_eos:
            return SequenceStatus.FINISHED_STOPPED
        if token_id in (params.stop_token_ids or ()):
            seq.stop_reason = token_id
            return SequenceStatus.FINISHED_STOPPED
        max_tokens = params.max_tokens
        if (max_tokens is not None and seq.num_completion_tokens >= max_tokens) or (
            seq.num_tokens >= self.limits.max_model_len
        ):
            return SequenceStatus.FINISHED_LENGTH_CAPPED
        return None

    def _finish(self, seq: Sequence, status: SequenceStatus | None, start: int) -> None:
        """End a sequence in whatever queue it stands, free its blocks and tell its client."""
        assert status is not None
        assert status.is_finished
        if seq.status is SequenceStatus.RUNNING:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        if seq.num_sent_blocks is not None:
            self._dropped.append(seq.seq_id)
        self.blocks.free(seq)
        seq.status = status
        self._emit(seq, start)
        if seq.request.is_finished():
            del self.requests[seq.request.key]

    def _emit(self, seq: Sequence, start: int) -> None:
        """Queue the tokens of `seq` from output position `start` on, and how it ended if it did."""
        token_ids = seq.token_ids[seq.num_prompt_tokens + start :]
        is_finished = seq.status is not SequenceStatus.RUNNING and seq.status.is_finished  # the quick question first
        if not token_ids and not is_finished:
            return
        delta = TokenDelta(seq.request.request_id, seq.index, start, token_ids)
        if is_finished:
            delta.finish_reason = seq.status.finish_reason
            delta.stop_reason, delta.error, delta.metrics = seq.stop_reason, seq.error, _metrics(seq)
        self._outbox.append(ClientDelta(seq.request.client_id, delta))

    def take_deltas(self) -> list[ClientDelta]:
        """What the front ends have to be told since the last call, in order."""
        outbox, self._outbox = self._outbox, []
        return outbox

    # -- recovery and checks ------------------------------------------------------------------------------------

    def new_epoch(self, epoch: Epoch, num_kv_blocks: int) -> None:
        """Start over with a fresh worker group: its cache is empty, so every sequence is computed again.

        Steps in flight are forgotten, and so is every block hash: a hit on one would be a lie.
        """
        self.epoch = epoch
        self._step_id = 0
        self._in_flight.clear()
        self._dropped.clear()
        for seq in reversed(self.running):
            seq.status = SequenceStatus.WAITING
            seq.num_preemptions += 1
            self.waiting.appendleft(seq)
        self.running.clear()
        for seq in self.waiting:
            seq.block_table.clear()
            seq.forget_computation()
        self.limits = dataclasses.replace(self.limits, num_kv_blocks=num_kv_blocks)
        self.blocks = BlockManager(num_kv_blocks, self.limits.block_size, self.limits.enable_prefix_caching)

    def check_invariants(self) -> None:
        """Raise AssertionError unless queues, requests and blocks agree."""
        queued = [*self.waiting, *self.running]
        assert len({seq.seq_id for seq in queued}) == len(queued), "a sequence stands in two places"
        live = [seq for request in self.requests.values() for seq in request.seqs if not seq.is_finished]
        assert {seq.seq_id for seq in live} == {seq.seq_id for seq in queued}, "a live sequence stands in no queue"
        assert all(request.get_seqs() and not request.is_finished() for request in self.requests.values())
        for seq in self.waiting:
            assert seq.status is SequenceStatus.WAITING, f"{seq} waits"
            assert not seq.block_table, f"{seq} waits and holds blocks"
            assert seq.num_computed_tokens == 0, f"{seq} waits and has computed tokens"
        for seq in self.running:
            assert seq.status is SequenceStatus.RUNNING, f"{seq} runs"
            assert seq.num_computed_tokens <= len(seq.block_table) * self.limits.block_size, f"{seq} outgrew its blocks"
            assert seq.num_computed_tokens <= seq.num_tokens, f"{seq} computed more than it has"
        assert len(self.running) <= self.limits.max_num_seqs
        if not queued:
            assert self.blocks.num_free_blocks == self.limits.num_kv_blocks, "a block is held by nobody"
        self.blocks.check_invariants(queued)


class _Batch:
    """The rows of the step that is being put together, in batch order, under its token budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.rows: dict[Sequence, int] = {}

    def add(self, seq: Sequence, num_tokens: int) -> None:
        self.rows[seq] = num_tokens
        self.budget -= num_tokens

    def remove(self, seq: Sequence) -> None:
        self.budget += self.rows.pop(seq, 0)


def _row_params(seq: Sequence) -> RowParams:
    params = seq.request.sampling_params
    return RowParams(
        temperature=float(params.temperature),
        top_k=max(0, params.top_k),
        top_p=float(params.top_p),
        min_p=float(params.min_p),
        seed=seq.request.seed,
        sequence_index=seq.index,
    )


def _metrics(seq: Sequence) -> dict[str, float]:
    request = seq.request
    scheduled = time.time() if request.first_scheduled_time is None else request.first_scheduled_time
    return {
        "num_cached_tokens": seq.num_cached_tokens,
        "num_preemptions": seq.num_preemptions,
        "queue_seconds": max(0.0, scheduled - request.arrival_time),
    }
