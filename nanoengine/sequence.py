"""The scheduler's view of a request: its sequences, their tokens and how far each is computed; knows no queue.

A sequence has one counter instead of phases: `num_computed_tokens` chases `num_tokens`. Chunked prefill, prefix
hits, preemption and recovery all fall out of that counter.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from typing import TYPE_CHECKING, Any

from nanoengine.messages import AddRequest
from nanoengine.prompt_log import PromptLog
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import TokenLogprobs

if TYPE_CHECKING:
    from nanoengine.beam_group import BeamGroup
    from nanoengine.decode_set import DecodeSet


class SequenceStatus(enum.Enum):
    """Where a sequence stands; the value of a finished one is its finish reason."""

    WAITING = "waiting"
    RUNNING = "running"
    SWAPPED = "swapped"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH_CAPPED = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_IGNORED = "ignored"
    FINISHED_ERROR = "error"

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self not in (SequenceStatus.WAITING, SequenceStatus.RUNNING, SequenceStatus.SWAPPED)

    @property
    def finish_reason(self) -> str | None:
        """What clients are told: stop, length, abort or error; None while unfinished.

        A request that is refused at admission (FINISHED_IGNORED) reads as an error to its client.
        """
        if not self.is_finished:
            return None
        return "error" if self is SequenceStatus.FINISHED_IGNORED else self.value


class Sequence:
    """One output of a request: prompt and generated tokens, and the K/V blocks that hold them.

    `num_computed_tokens` counts the tokens whose K/V is computed or being computed by a step in flight.
    `num_pending_tokens` counts the tokens that steps in flight sample: they follow `token_ids`, their ids unknown.
    `num_sent_blocks` counts the entries of `block_table` that the workers know; None: they know nothing of this
    sequence, and its full state travels with its next row.
    `host_blocks` holds what is computed of a swapped sequence, block by block, in the place of `block_table`.
    `first_seq_id` is the seq_id of the sequence that it was forked off in the first place, whose turn it has.

    While it is a steady decode (`steady` is the set it is in) both counters follow from the set's clock, and whoever
    wants to change them makes it leave the set first.
    """

    __slots__ = (
        "_num_computed",
        "_num_pending",
        "block_hashes",
        "block_table",
        "error",
        "first_seq_id",
        "host_blocks",
        "index",
        "logprobs",
        "num_preemptions",
        "num_prompt_tokens",
        "num_sent_blocks",
        "prompt_log",
        "request",
        "seq_id",
        "status",
        "steady",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, seq_id: int, request: Request, index: int, journal: list[int]) -> None:
        self.seq_id = self.first_seq_id = seq_id
        self.request = request
        self.index = index
        self.token_ids = [*request.prompt_token_ids, *journal]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.steady: DecodeSet | None = None
        self._num_computed = 0
        self._num_pending = 0
        self.num_preemptions = 0
        self.num_sent_blocks: int | None = None
        self.block_table: list[int] = []
        self.block_hashes: list[bytes] = []
        self.host_blocks: list[int] = []
        self.status = SequenceStatus.WAITING
        self.stop_reason: int | None = None
        self.error: dict[str, Any] | None = None
        # One entry an output token, where they are asked for. Those of the journal are with the front end.
        asked = request.sampling_params.logprobs is not None
        self.logprobs: list[TokenLogprobs | None] | None = [None] * len(journal) if asked else None
        # Those of the prompt are told once, by the first sequence.
        self.prompt_log: PromptLog | None = None
        if index == 0 and request.sampling_params.prompt_logprobs is not None:
            self.prompt_log = PromptLog(request.num_prompt_logprobs, self.num_prompt_tokens - 1)

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""
        return len(self.token_ids)

    @property
    def num_completion_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def completion_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_computed_tokens(self) -> int:
        """Tokens whose K/V is computed or being computed."""
        return self._num_computed if self.steady is None else self._num_computed + self.steady.age

    @num_computed_tokens.setter
    def num_computed_tokens(self, number: int) -> None:
        assert self.steady is None, f"{self} is a steady decode"
        self._num_computed = number

    @property
    def num_pending_tokens(self) -> int:
        """Tokens that steps in flight sample."""
        if self.steady is None:
            return self._num_pending
        return self.num_computed_tokens + 1 - len(self.token_ids)  # a steady decode lacks one token, ever

    @num_pending_tokens.setter
    def num_pending_tokens(self, number: int) -> None:
        assert self.steady is None, f"{self} is a steady decode"
        self._num_pending = number

    def ride(self, steady: DecodeSet) -> None:
        """Let the clock of `steady` count from here on."""
        self._num_computed -= steady.age
        self.steady = steady

    def alight(self) -> None:
        """Count for oneself again."""
        self._num_computed, self._num_pending, self.steady = self.num_computed_tokens, self.num_pending_tokens, None

    def max_num_tokens(self, max_model_len: int) -> int:
        """The number of tokens, those of the prompt included, that ends it."""
        if self.request.beams is not None:
            return len(self.token_ids) + 1  # what follows a beam is decided when that is known, never ahead
        max_tokens = self.request.sampling_params.max_tokens
        return max_model_len if max_tokens is None else min(max_model_len, self.num_prompt_tokens + max_tokens)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that no step has been given yet, a pending one included: 1 for a steady decode."""
        return 1 if self.steady is not None else len(self.token_ids) + self._num_pending - self._num_computed

    @property
    def num_hittable_tokens(self) -> int:
        """How many tokens a prefix hit may cover: what has an output to give must be computed, the last token for one.

        So must every prompt token whose logits somebody waits for.
        """
        if self.prompt_log is None or self.prompt_log.is_complete:
            return len(self.token_ids) - 1
        return self.prompt_log.end

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self.status.is_finished

    def append_token(self, token_id: int, logprobs: TokenLogprobs | None = None) -> None:
        """Add a generated token; it is not computed yet."""
        self.token_ids.append(token_id)
        if self.logprobs is not None:
            self.logprobs.append(logprobs)

    def forget_computation(self) -> None:
        """Go back to nothing computed (its blocks are freed by whoever calls): after preemption or a new epoch."""
        self.num_computed_tokens = 0
        self.num_sent_blocks = None
        if self.status is SequenceStatus.SWAPPED:
            self.status, self.host_blocks = SequenceStatus.WAITING, []

    def fork(self, seq_id: int, index: int) -> Sequence:
        """A copy that goes its own way from here; it shares nothing that may change with its parent."""
        child = Sequence(seq_id, self.request, index, self.completion_token_ids)
        child.first_seq_id = self.first_seq_id
        child.num_computed_tokens = self.num_computed_tokens
        child.block_table = list(self.block_table)
        child.block_hashes = list(self.block_hashes)
        child.status = self.status
        child.logprobs = None if self.logprobs is None else list(self.logprobs)
        return child

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.request.request_id!r}[{self.index}], {self.status.name}, "
            f"computed {self.num_computed_tokens} of {self.num_tokens})"
        )


class Request:
    """One client request and its sequences. `prompt` is the text it came from, where that is known here.

    Only requests of the same `cache_salt` share cached prefixes. `num_prompt_logprobs` entries of the prompt's
    log-probabilities are with the front end already. An eos ends an output that matches a `grammar` even under
    ignore_eos: the workers let it come only where nothing else can.
    """

    __slots__ = (
        "arrival_time",
        "beams",
        "cache_salt",
        "client_id",
        "first_scheduled_time",
        "grammar",
        "ignores_eos",
        "num_cached_tokens",
        "num_prompt_logprobs",
        "priority",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "sampling_params",
        "seed",
        "seqs",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        *,
        client_id: str = "",
        prompt: str | None = None,
        arrival_time: float | None = None,
        priority: int = 0,
        seed: int = 0,
        cache_salt: str = "",
        num_prompt_logprobs: int = 0,
        grammar: str = "",
    ) -> None:
        self.request_id = request_id
        self.client_id = client_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.sampling_params = sampling_params
        self.arrival_time = time.time() if arrival_time is None else arrival_time
        self.priority = priority
        self.seed = seed
        self.cache_salt = cache_salt
        self.num_prompt_logprobs = num_prompt_logprobs
        self.grammar = grammar
        self.ignores_eos = sampling_params.ignore_eos and not grammar
        self.first_scheduled_time: float | None = None
        self.beams: BeamGroup | None = None  # of a beam search; `seqs` are its beams then
        self.num_cached_tokens = 0  # of the prompt, when the first of its sequences was scheduled first
        self.seqs: list[Sequence] = []

    @classmethod
    def of(cls, message: AddRequest, params: SamplingParams, beams: BeamGroup | None = None) -> Request:
        """What a front end asks for; `params` are those of the message."""
        request = cls(
            message.request_id,
            message.prompt_token_ids,
            params,
            client_id=message.client_id,
            arrival_time=message.arrival_time,
            priority=message.priority,
            seed=message.seed,
            cache_salt=message.cache_salt,
            num_prompt_logprobs=message.num_prompt_logprobs,
            grammar=message.grammar,
        )
        request.beams = beams
        return request

    @property
    def key(self) -> tuple[str, str]:
        """What names a request to the scheduler: request ids are unique within a client only."""
        return (self.client_id, self.request_id)

    @property
    def best_of(self) -> int:
        """How many sequences are generated; `sampling_params.n` of them are shown, the best ones."""
        return self.sampling_params.num_sequences

    def get_seqs(self, status: SequenceStatus | None = None) -> list[Sequence]:
        """Its sequences, or those of one status."""
        return [seq for seq in self.seqs if status is None or seq.status is status]

    def is_finished(self) -> bool:
        """Whether every sequence is."""
        return all(seq.is_finished for seq in self.seqs)


@dataclasses.dataclass(slots=True)
class ScheduledRow:
    """What a step in flight computes of a sequence: `num_tokens` tokens from position `start` on.

    `num_preemptions` is the sequence's count at that moment: a row of an earlier life is discarded.
    """

    seq: Sequence
    start: int
    num_tokens: int
    sample: bool
    num_preemptions: int

    @property
    def is_decode(self) -> bool:
        """Whether it computes a generated token, and that alone."""
        return self.num_tokens == 1 and self.start >= self.seq.num_prompt_tokens
