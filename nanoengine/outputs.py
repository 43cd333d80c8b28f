"""What a user gets back: plain data, the same from Python and (rendered) over HTTP; knows no engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True, frozen=True)
class Logprob:
    """One token's natural log-probability under the model's own logits, before anything changed them.

    `rank` counts from 1, the likeliest. `decoded_token` is its text, None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclasses.dataclass(slots=True)
class CompletionOutput:
    """One sequence of an answer. `finish_reason` is stop, length, abort or error, None while it runs.

    `stop_reason` is the stop string or stop token id that ended it (None for eos). `cumulative_logprob` and
    `logprobs` are None unless log-probabilities were asked for; then there is a dict for each token, by token id: first
    the chosen one, then the likeliest in their order.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """Times are seconds of `time.time()`; a token time is None until there was one."""

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_seconds: float = 0.0


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """The state of one request: everything generated so far. `prompt` is None when token ids came in."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
