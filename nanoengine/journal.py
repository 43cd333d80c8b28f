"""The front end's record of a request: what was asked, and every token that was accepted for it; knows no transport.

The journal is the truth about what a client was told. A token enters it first and is shown afterwards, so whatever
happens below the front end, the request can be handed to another scheduler and goes on behind its last token.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from configs.errors import NanoEngineError
from nanoengine.detokenizer import IncrementalDetokenizer, StopChecker
from nanoengine.messages import Abort, AddRequest, TokenDelta
from nanoengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.sampling_params import SamplingParams
from nanoengine.step import PromptLogprobs

if TYPE_CHECKING:
    from nanoengine.beam_params import BeamSearchParams
    from nanoengine.tokenizer import Tokenizer

_METRIC_TYPES = {"num_cached_tokens": int, "num_preemptions": int, "queue_seconds": float}


@dataclasses.dataclass(frozen=True, slots=True)
class CheckedRequest:
    """A request that was checked and may be added.

    `max_tokens` is what fits into max_model_len, `grammar` what its structured_outputs were compiled to.
    """

    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_tokens: int
    cache_salt: str = ""
    grammar: str = ""
    beams: BeamSearchParams | None = None


class SequenceJournal:
    """Tokens and text of one sequence. Without a tokenizer the text stays empty."""

    __slots__ = (
        "_chosen",
        "_detokenizer",
        "_include_stop",
        "_min_tokens",
        "_parts",
        "_stops",
        "_tokenizer",
        "error",
        "finish_reason",
        "index",
        "last_token_time",
        "logprobs",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self, index: int, prompt_token_ids: list[int], params: SamplingParams, tokenizer: Tokenizer | None
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.last_token_time: float | None = None
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self._chosen: list[float] = []  # log-probabilities of the tokens, where they are known
        self._tokenizer = tokenizer
        self._parts: list[str] = []
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = IncrementalDetokenizer(tokenizer, prompt_token_ids, params.skip_special_tokens)
        self._stops = StopChecker(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._include_stop = params.include_stop_str_in_output

    @property
    def text(self) -> str:
        """The text so far; what may still become a stop string or a whole character is held back."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    @property
    def is_finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None

    def append(
        self, token_ids: list[int], *, hide_last: bool = False, logprobs: Sequence[Any] | None = None
    ) -> str | None:
        """Record tokens, then render them; returns the stop string that one of them completed.

        Tokens behind that one are neither recorded nor rendered. `hide_last` records the last token without
        rendering it: the text ends before a stop token, as it ends before a stop string, unless the client wants to
        see them. `logprobs` are the tokens' `step.TokenLogprobs`, as they came over the wire.
        """
        first = len(self.token_ids)
        matched = self._append_tokens(token_ids, hide_last and not self._include_stop)
        known = (logprobs or ())[: len(self.token_ids) - first]
        self._chosen += [entry[1][0] for entry in known if entry is not None]
        if self.logprobs is not None:
            recorded = itertools.zip_longest(self.token_ids[first:], known)
            self.logprobs += [{} if entry is None else _readable(entry, self._tokenizer) for _, entry in recorded]
        return matched

    def _append_tokens(self, token_ids: list[int], hide_last: bool) -> str | None:
        if self._detokenizer is None:
            self.token_ids += token_ids
            return None
        shown = token_ids[:-1] if hide_last else token_ids
        if self._stops is None:
            self.token_ids += token_ids
            self._show(self._detokenizer.append(shown))
            return None
        for token_id in shown:  # one by one, to know which token completes the stop string
            self.token_ids.append(token_id)
            if len(self.token_ids) <= self._min_tokens:  # no stop string may lie here
                self._show(self._detokenizer.append([token_id]))
                continue
            text, matched = self._stops.feed(self._detokenizer.append([token_id]))
            self._show(text)
            if matched is not None:
                self._show(matched if self._include_stop else "")
                return matched
        self.token_ids += token_ids[len(shown) :]
        return None

    def finish(self, reason: str, stop_reason: int | str | None = None, error: str | None = None) -> None:
        """End the sequence, render what was held back (unless a stop string ended it) and free the detokeniser."""
        self.finish_reason, self.stop_reason, self.error = reason, stop_reason, error
        detokenizer, self._detokenizer = self._detokenizer, None
        stops, self._stops = self._stops, None
        if detokenizer is None or isinstance(stop_reason, str):
            return
        rest = detokenizer.finish()
        if stops is not None:
            rest, matched = stops.feed(rest)
            if matched is None:
                rest += stops.flush()
            elif reason in ("stop", "length"):
                self.finish_reason, self.stop_reason = "stop", matched
                rest += matched if self._include_stop else ""
        self._show(rest)

    def fail(self, error: str) -> None:
        """End the sequence where even rendering the rest may be what failed."""
        self.finish_reason, self.error = "error", error
        self._detokenizer = self._stops = None

    def output(self) -> CompletionOutput:
        """A snapshot for the client."""
        return CompletionOutput(
            self.index,
            self.text,
            list(self.token_ids),
            None if self.logprobs is None else self.cumulative_logprob,
            None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    @property
    def cumulative_logprob(self) -> float:
        """Sum over the tokens, under the model's own logits; 0 where log-probabilities did not come along."""
        return math.fsum(self._chosen)

    def _show(self, text: str) -> None:
        if text:
            self._parts.append(text)


def _readable(entry: Any, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """A token's log-probabilities by token id, with texts; the chosen one may be among the likeliest as well."""
    ids, values, rank = entry
    text = (lambda _: None) if tokenizer is None else tokenizer.token_text
    found = {ids[0]: Logprob(values[0], rank, text(ids[0]))}
    for place, (token_id, value) in enumerate(zip(ids[1:], values[1:], strict=True), start=1):
        if token_id not in found:
            found[token_id] = Logprob(value, place, text(token_id))
    return found


class RequestJournal:
    """Everything that is needed to show a request, or to hand it to a scheduler again.

    `wire_id` names it to the scheduler. It is never used twice, so that a late delta of an aborted request cannot
    be taken for one of a later request to which the client gave the same id. `failure` is the error that ended it.
    """

    def __init__(
        self,
        request_id: str,
        wire_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        max_tokens: int,
        seed: int,
        priority: int,
        arrival_time: float,
        tokenizer: Tokenizer | None,
        cache_salt: str = "",
        timeout: float | None = None,
        grammar: str = "",
        beams: BeamSearchParams | None = None,
    ) -> None:
        self.request_id = request_id
        self.wire_id = wire_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.priority = priority
        self.cache_salt = cache_salt
        self.timeout = timeout
        self.grammar = grammar
        self.beams = beams
        self.metrics = RequestMetrics(arrival_time)
        self.sequences = [SequenceJournal(i, prompt_token_ids, params, tokenizer) for i in range(params.num_sequences)]
        self.failure: NanoEngineError | None = None
        self._tokenizer = tokenizer
        self._prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = [None]
        # Shared by all outputs, since copying a long prompt for each token would cost more than the token.
        self._shown_prompt = list(prompt_token_ids)
        # How often its tokens were asked for again since it last got one, and when that may be done next.
        self.num_replays = 0
        self.next_replay = 0.0

    @property
    def finished(self) -> bool:
        """Whether every sequence is."""
        return all(sequence.is_finished for sequence in self.sequences)

    @property
    def has_output(self) -> bool:
        """Whether `output` shows anything: the best of several candidates are known when all of them have ended."""
        return self.finished or not (self.params.ranks_candidates or self.beams)

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_generated_tokens(self) -> int:
        """Tokens recorded so far, over all sequences."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def num_prompt_logprobs(self) -> int:
        """How many entries (see `step.PromptLogprobs`) of the prompt's log-probabilities are recorded."""
        return 0 if self._prompt_logprobs is None else len(self._prompt_logprobs) - 1

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether some that were asked for are still to come; no token of the first sequence comes before them."""
        return self._prompt_logprobs is not None and len(self._prompt_logprobs) < self.num_prompt_tokens

    def add_prompt_logprobs(self, chunk: PromptLogprobs) -> bool:
        """Record the entries of a chunk that are next, none if it leaves a gap; says whether there were any."""
        known = self.num_prompt_logprobs
        if not self.lacks_prompt_logprobs or not chunk.start <= known < chunk.end:
            return False
        assert self._prompt_logprobs is not None
        self._prompt_logprobs += [_readable(entry, self._tokenizer) for entry in chunk.since(known).entries()]
        self.num_replays, self.next_replay = 0, 0.0
        return True

    def lacks_prompt_before(self, delta: TokenDelta) -> bool:
        """Whether log-probabilities of the prompt were lost on the way that come before what `delta` brings."""
        if delta.index or not self.lacks_prompt_logprobs:
            return False
        told = delta.prompt_logprobs
        return bool(delta.token_ids or delta.finish_reason or (told and told.start > self.num_prompt_logprobs))

    def is_overdue(self, now: float) -> bool:
        """Whether its time is over, at `now` of time.time()."""
        return self.timeout is not None and self.metrics.arrival_time + self.timeout <= now

    def touch(self, now: float) -> None:
        """Tokens were recorded: note the time, and forget that some were missing."""
        self.num_replays, self.next_replay = 0, 0.0
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        self.metrics.last_token_time = now

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Take over what the scheduler measured; a name that this side does not know is left alone."""
        for name, kind in _METRIC_TYPES.items():
            if name in metrics:
                setattr(self.metrics, name, kind(metrics[name]))

    def output(self) -> RequestOutput:
        """A snapshot for the client: all tokens so far; it does not change any more, nor does the journal with it."""
        outputs = []
        for index, sequence in enumerate(self._shown()):
            output = sequence.output()
            output.index = index
            if output.finish_reason == "error" and self.failure is not None:
                output.error_kind = type(self.failure).__name__
            if self.beams is not None and output.token_ids:
                output.cumulative_logprob = sequence.cumulative_logprob
            outputs.append(output)
        return RequestOutput(
            self.request_id,
            self.prompt,
            self._shown_prompt,
            outputs,
            self.finished,
            self.measured(),
            # Shared by all outputs, like the prompt, once nothing is added any more.
            list(self._prompt_logprobs or ()) if self.lacks_prompt_logprobs else self._prompt_logprobs,
        )

    def measured(self) -> RequestMetrics:
        """How it went so far; a copy."""
        return dataclasses.replace(
            self.metrics,
            num_generated_tokens=max(len(sequence.token_ids) for sequence in self.sequences),
            num_completion_tokens=self.num_generated_tokens,
        )

    def _shown(self) -> list[SequenceJournal]:
        """All sequences, or the `n` best candidates, the best first."""
        if not self.params.ranks_candidates:
            return self.sequences
        if not self.finished:
            return []
        # A failure must be seen, and what was broken off is no match for an answer, however few tokens it has.
        place = {"error": 0, "abort": 2}
        ranked = sorted(self.sequences, key=lambda seq: (place.get(str(seq.finish_reason), 1), -seq.cumulative_logprob))
        return ranked[: self.params.n]

    def submission(self, client_id: str) -> list[AddRequest | Abort]:
        """What makes a scheduler serve this request from its last token on, whatever it knew of it before."""
        params: dict[str, Any] = self.params.to_dict()
        params["max_tokens"] = self.max_tokens
        params["min_tokens"] = min(self.params.min_tokens, self.max_tokens)
        if self.params.ranks_candidates and self.params.logprobs is None:
            params["logprobs"] = 0  # of the sampled tokens, to rank by
        for name in ("stop", "bad_words", "structured_outputs"):  # text is this side's business
            del params[name]
        add = AddRequest(
            client_id=client_id,
            request_id=self.wire_id,
            prompt_token_ids=self.prompt_token_ids,
            params=params,
            seed=self.seed,
            arrival_time=self.metrics.arrival_time,
            priority=self.priority,
            # A beam search starts again from its prompt.
            journal=[[] if self.beams else list(sequence.token_ids) for sequence in self.sequences],
            cache_salt=self.cache_salt,
            timeout=self.timeout,
            num_prompt_logprobs=self.num_prompt_logprobs,
            grammar=self.grammar,
            beam_search=None if self.beams is None else self.beams.to_dict(),
        )
        # A sequence that a stop string ended looks unfinished to a scheduler that knows its tokens only.
        ended = [sequence for sequence in self.sequences if sequence.is_finished]
        return [add, *(Abort(self.wire_id, sequence.index, str(sequence.finish_reason)) for sequence in ended)]
