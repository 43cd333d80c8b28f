"""What a user gets back: plain data, the same from Python and (rendered) over HTTP; knows no engine."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
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
    `logprobs` are None unless log-probabilities were asked for (a beam search always tells their sum); then there is a
    dict for each token, by token id: first the chosen one, then the likeliest in their order. `error` says why it
    ended with an error, `error_kind` is that error's name in `configs.errors`.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_kind: str | None = None

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None


@dataclasses.dataclass(slots=True)
class RequestMetrics:
    """How a request went, as its front end saw it. Times are seconds of `time.time()`.

    A time is None until it has come. The counts and `queue_seconds` (from arrival until the first step that computed
    some of it) come from the scheduler with the request's last token. `num_generated_tokens` is the length of the
    longest sequence, `num_completion_tokens` that of all together, candidates that are not shown (best_of) included.
    """

    arrival_time: float
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    queue_seconds: float = 0.0
    num_generated_tokens: int = 0
    num_completion_tokens: int = 0

    @property
    def ttft(self) -> float | None:
        """Time to first token: seconds from arrival until it."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def tpot(self) -> float | None:
        """Time per output token: mean seconds between the tokens that follow the first; None for fewer than two."""
        if self.first_token_time is None or self.last_token_time is None or self.num_generated_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_generated_tokens - 1)

    @property
    def e2e_seconds(self) -> float | None:
        """Seconds from arrival to the end."""
        return None if self.finished_time is None else self.finished_time - self.arrival_time


@dataclasses.dataclass(slots=True)
class RequestOutput:
    """The state of one request: everything generated so far. `prompt` is None when token ids came in.

    `prompt_logprobs` is None unless they were asked for. Then there is an entry for each prompt token told of so far,
    for all of them once there is an output token: None for the first, which nothing predicts, then a dict by token id
    as in `CompletionOutput.logprobs`.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
