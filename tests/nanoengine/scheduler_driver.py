"""Drives the real scheduler with invented outputs: no model, no process. Shared by the scheduler's tests."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

from nanoengine.beam_params import BeamSearchParams
from nanoengine.messages import AddRequest, TokenDelta
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler import Scheduler, SchedulerLimits
from nanoengine.step import (
    DEVICE_TO_DEVICE,
    DEVICE_TO_HOST,
    HOST_TO_DEVICE,
    PREVIOUS_SAMPLE,
    Epoch,
    PromptLogprobs,
    SequenceState,
    StepInput,
    StepOutput,
    TokenLogprobs,
)

VOCAB = 1000
EOS = 2
EPOCH = Epoch(1, 1)


def invented_token(context: list[int], index: int = 0) -> int:
    """The token that sequence `index` samples after `context`: a function of all of it, never eos."""
    digest = hashlib.blake2b(repr(context).encode() + b"%d" % index, digest_size=4).digest()
    return 3 + int.from_bytes(digest, "big") % (VOCAB - 3)


def expected_output(prompt: list[int], num_tokens: int, index: int = 0) -> list[int]:
    """What an undisturbed run generates as sequence `index` of its request."""
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(invented_token(context, index))
    return context[len(prompt) :]


def invented_logprobs(context: list[int], following: int) -> TokenLogprobs:
    """What is told of the token after `context`: a function of all of it."""
    likeliest = invented_token(context)
    return [following, likeliest], [-float(likeliest), -0.5], len(context)


def expected_prompt_logprobs(prompt: list[int]) -> list[TokenLogprobs]:
    """What an undisturbed run tells of a prompt."""
    return [invented_logprobs(prompt[:length], prompt[length]) for length in range(1, len(prompt))]


def packed(start: int, entries: list[TokenLogprobs]) -> PromptLogprobs:
    """Entries as they travel."""
    ids, values, ranks = zip(*entries, strict=True)
    columns = array("i", chain.from_iterable(ids)), array("f", chain.from_iterable(values)), array("i", ranks)
    return PromptLogprobs(start, len(ids[0]), *(column.tobytes() for column in columns))


class FakeWorkers:
    """Holds paged "K/V" (the token ids themselves) and samples from what is really in the blocks.

    A wrong block table, a stale hit, a missed copy or a wrong position shows up as a wrong token, or as a wrong
    log-probability of the prompt. `num_told` counts the latter, by sequence and entry.
    """

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0) -> None:
        self.num_blocks, self.num_host_blocks = num_blocks, num_host_blocks
        self.block_size = block_size
        self.slots: dict[tuple[int, int], int] = {}
        self.host_slots: dict[tuple[int, int], int] = {}
        self.tables: dict[int, list[int]] = {}
        self.indexes: dict[int, int] = {}
        self.previous: dict[int, int] = {}
        self.prompts: dict[int, tuple[int, list[int]]] = {}  # entries told, and the prompt, of those that ask
        self.num_told: Counter[tuple[int, int]] = Counter()

    def run(self, step: StepInput) -> StepOutput:
        step = StepInput.unpack(_through_pickle(step.pack()))
        self._perform_copies(step)
        for seq_id in step.finished:
            self.tables.pop(seq_id, None)
            self.prompts.pop(seq_id, None)
        sampled, told = [], {}
        for row in step.rows:
            if row.params is not None:
                self.tables[row.seq_id] = []
                self.indexes[row.seq_id] = row.params.sequence_index
                self.prompts.pop(row.seq_id, None)
                if row.extras is not None and row.extras.num_prompt_logprobs >= 0:
                    prompt = list(row.past_token_ids[: row.num_prompt_tokens])
                    self.prompts[row.seq_id] = row.extras.first_prompt_logprob, prompt
            table = self.tables[row.seq_id]
            table.extend(row.new_block_ids)
            token_ids = [self.previous[row.seq_id]] if row.token_ids == [PREVIOUS_SAMPLE] else row.token_ids
            for position, token in enumerate(token_ids, start=row.num_computed_tokens):
                self.slots[table[position // self.block_size], position % self.block_size] = token
        for number, row in enumerate(step.rows):
            table, end = self.tables[row.seq_id], row.num_computed_tokens + len(row.token_ids)
            context = [self.slots[table[p // self.block_size], p % self.block_size] for p in range(end)]
            sampled.append([invented_token(context, self.indexes[row.seq_id])] if row.sample else [])
            if row.seq_id in self.prompts:
                told |= self._tell(number, row, context)
        self.previous = {row.seq_id: ids[0] for row, ids in zip(step.rows, sampled, strict=True) if ids}
        seq_ids = [row.seq_id for row in step.rows]
        return StepOutput.unpack(
            _through_pickle(StepOutput(step.epoch, step.step_id, seq_ids, sampled, prompt_logprobs=told).pack())
        )

    def _tell(self, number: int, row: SequenceState, context: list[int]) -> dict[int, PromptLogprobs]:
        start, prompt = self.prompts[row.seq_id]
        end = min(len(context), len(prompt) - 1)
        if end <= start:
            return {}
        assert row.num_computed_tokens <= start, "positions were passed over that nobody told of"
        self.prompts[row.seq_id] = end, prompt
        self.num_told.update((row.seq_id, entry) for entry in range(start, end))
        entries = [invented_logprobs(context[: entry + 1], prompt[entry + 1]) for entry in range(start, end)]
        return {number: packed(start, entries)}

    def _perform_copies(self, step: StepInput) -> None:
        """Move the content of blocks, in order; what was never written stays so, and reading it fails."""
        device, host = (self.slots, self.num_blocks), (self.host_slots, self.num_host_blocks)
        sides = {DEVICE_TO_DEVICE: (device, device), DEVICE_TO_HOST: (device, host), HOST_TO_DEVICE: (host, device)}
        for direction, source, destination in step.copies:
            (read, num_read), (written, num_written) = sides[direction]
            assert 0 <= source < num_read
            assert 0 <= destination < num_written
            content = [read.get((source, offset)) for offset in range(self.block_size)]
            for offset, token in enumerate(content):
                written.pop((destination, offset), None)
                if token is not None:
                    written[destination, offset] = token

    def lose_everything(self) -> None:
        """What a new worker group knows."""
        self.slots.clear()
        self.host_slots.clear()
        self.tables.clear()
        self.previous.clear()
        self.prompts.clear()


def _through_pickle(frame: bytes) -> Any:
    import pickle

    return pickle.loads(frame)  # noqa: S301 - our own bytes, a moment old


def output_name(request_id: str, index: int) -> str:
    """Under which name the driver keeps a sequence: the request's id, for further ones with their index."""
    return f"{request_id}[{index}]" if index else request_id


def prompt_of(length: int, salt: int = 0) -> list[int]:
    return [3 + (salt * 131 + i * 7) % 900 for i in range(length)]


class Driver:
    """A scheduler, invented workers and a client that keeps what it was told.

    Under `async_scheduling` a step is scheduled before the one in front of it is committed.
    """

    def __init__(self, async_scheduling: bool = False, **limits: Any) -> None:
        defaults: dict[str, Any] = {
            "max_num_batched_tokens": 64,
            "max_num_seqs": 16,
            "max_model_len": 256,
            "num_kv_blocks": 64,
            "block_size": 4,
            "eos_token_ids": frozenset({EOS}),
            "vocab_size": VOCAB,
        }
        self.limits = SchedulerLimits(**(defaults | limits))
        self.now = 0.0
        self.step_seconds: Callable[[StepInput], float] = lambda step: 0.0
        self.scheduler = Scheduler(self.limits, EPOCH, lambda: self.now)
        self.workers = FakeWorkers(self.limits.num_kv_blocks, self.limits.block_size, self.limits.num_host_blocks)
        self.tokens: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
        self._first_entry: dict[str, int] = {}
        self.finished: dict[str, str] = {}
        self.last: dict[str, TokenDelta] = {}
        self.steps: list[StepInput] = []
        self.max_in_flight = 2 if async_scheduling else 1
        self.outputs: deque[StepOutput] = deque()  # of the steps in flight

    def add(
        self,
        request_id: str,
        prompt: list[int],
        journal: list[int] | None = None,
        client: str = "c",
        cache_salt: str = "",
        priority: int = 0,
        timeout: float | None = None,
        journals: list[list[int]] | None = None,
        num_prompt_logprobs: int = 0,
        beams: BeamSearchParams | None = None,
        grammar: str = "",
        **params: Any,
    ) -> None:
        """`journal` is that of the first sequence, `journals` those of all; `beams` stand in for `params`."""
        sampling = SamplingParams(**({"temperature": 0, "max_tokens": 8} | params))
        if beams is not None:
            sampling = beams.sampling_params()
        journals = journals or [journal or [], *([] for _ in range(1, sampling.num_sequences))]
        message = AddRequest(
            client,
            request_id,
            prompt,
            sampling.to_dict(),
            seed=0,
            arrival_time=self.now,
            priority=priority,
            journal=journals,
            cache_salt=cache_salt,
            timeout=timeout,
            num_prompt_logprobs=num_prompt_logprobs,
            beam_search=None if beams is None else beams.to_dict(),
            grammar=grammar,
        )
        for index, known in enumerate(journals):
            self.tokens[output_name(request_id, index)] = list(known)
        self.prompt_logprobs[request_id] = []
        self._first_entry[request_id] = num_prompt_logprobs
        self.scheduler.add(message)
        self.receive()

    def abort(self, request_id: str, client: str = "c", index: int | None = None) -> None:
        self.scheduler.abort(client, request_id, index)
        self.receive()

    def step(self) -> StepInput | None:
        """Expire, schedule and run one step, commit the oldest in flight, check the invariants, take in the deltas."""
        self.scheduler.expire()
        step = self.scheduler.schedule()
        self.scheduler.check_invariants()
        if step is not None:
            assert sum(len(row.token_ids) for row in step.rows) <= self.limits.max_num_batched_tokens
            self.steps.append(step)
            self.outputs.append(self.workers.run(step))
            self.outputs[-1].compute_seconds = self.step_seconds(step)
        if self.outputs and (step is None or len(self.outputs) == self.max_in_flight):
            self.commit_oldest()
        self.scheduler.check_invariants()
        self.receive()
        return step

    def commit_oldest(self) -> None:
        """Take in the output of the oldest step in flight."""
        output = self.outputs.popleft()
        self.now += output.compute_seconds
        self.scheduler.commit(output)

    def new_epoch(self, epoch: Epoch) -> None:
        """The worker group is lost and another one starts; what the old one still says comes too late."""
        late, self.outputs = self.outputs, deque()
        self.workers.lose_everything()
        self.scheduler.new_epoch(epoch, self.limits.num_kv_blocks, self.limits.num_host_blocks)
        self.scheduler.check_invariants()
        for output in late:
            self.scheduler.commit(output)

    def receive(self) -> None:
        for item in self.scheduler.take_deltas():
            delta = item.delta
            name = output_name(delta.request_id, delta.index)
            assert name not in self.finished, "a delta after the end"
            tokens = self.tokens[name]
            assert delta.start == len(tokens), "a stream lost or repeated a token"
            told = self.prompt_logprobs[delta.request_id]
            if delta.prompt_logprobs is not None:
                assert not tokens, "a token came before the prompt was told of"
                assert delta.prompt_logprobs.start == self._first_entry[delta.request_id] + len(told)
                told.extend(delta.prompt_logprobs.entries())
            tokens.extend(delta.token_ids)
            self.last[name] = delta
            if delta.finish_reason:
                self.finished[name] = delta.finish_reason

    def perform(self, operation: tuple[Any, ...]) -> None:
        """What random tests do beside adding requests, which are named r0, r1 and so on; the books are checked.

        `("abort", number)` or `("abort", number, index)`, `("step", count)`, `("reset",)` forgets cached prefixes,
        `("epoch",)` begins the next group of ranks.
        """
        match operation:
            case ("abort", number, *index):
                self.abort(f"r{number}", index=index[0] if index else None)
            case ("step", count):
                for _ in range(count):
                    self.step()
            case ("reset",):
                self.scheduler.blocks.reset_prefix_cache()
            case ("epoch",):
                incarnation, group = self.scheduler.epoch
                self.new_epoch(Epoch(incarnation, group + 1))
            case _:
                raise AssertionError(operation)
        self.scheduler.check_invariants()

    def check(self, asked: Mapping[str, tuple[list[int], list[int]]], num_slots: int) -> None:
        """All outputs ended, and hold what an undisturbed run generates, or the begin of it where memory ended.

        Args:
            asked: for each output its prompt, and all that it would generate.
            num_slots: tokens that the cache holds.
        """
        assert set(self.finished) == set(asked)
        for name, (prompt, wanted) in asked.items():
            found, reason = self.tokens[name], self.finished[name]
            is_whole = reason == "stop" or (reason == "length" and len(prompt) + len(wanted) <= num_slots)
            assert found == (wanted if is_whole else wanted[: len(found)])

    def run(self, max_steps: int = 10_000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "the scheduler came to no end"
        while self.outputs:
            self.step()
        # The workers are told of the last finished rows.
        self.step()
        blocks = self.scheduler.blocks
        assert blocks.num_free_blocks == self.limits.num_kv_blocks, "a block leaked"
        assert blocks.host.num_free_blocks == self.limits.num_host_blocks, "a host block leaked"
