"""What a front end counts of its requests: each from its acceptance to its end, and each HTTP answer.

Every request that the engine accepts ends in exactly one way, so that

    requests_accepted = request_success (stop, length, abort) + request_failure (error, timeout)

once nothing is open. It knows neither routes nor how the numbers are shown (`exposition`). They are plain numbers, so
that those of several front ends can be added up (`shared_numbers`), and a token costs a front end about a microsecond.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, NamedTuple

from configs.errors import RequestTimeoutError
from nanoengine.journal import RequestJournal, SequenceJournal
from nanoengine.recorder import RequestRecorder

_LATENCIES = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_TOKEN_TIMES = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_FIRST_TOKEN_TIMES = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_UP_TO_MODEL_LEN: tuple[float, ...] = ()  # 1, 2, 5, 10 … as far as max_model_len


class HistogramKind(NamedTuple):
    """What a histogram measures, and the upper bounds of its buckets."""

    help: str
    bounds: tuple[float, ...]


class CounterKind(NamedTuple):
    """What a counter counts, its labels, and the values of them that are shown from the start."""

    help: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ((),)


# Names and buckets are vLLM's.
HISTOGRAMS = {
    "time_to_first_token_seconds": HistogramKind("Seconds from arrival to the first token.", _FIRST_TOKEN_TIMES),
    "inter_token_latency_seconds": HistogramKind("Seconds between two tokens of a sequence.", _TOKEN_TIMES),
    "request_time_per_output_token_seconds": HistogramKind(
        "Mean seconds between the tokens of a complete request.", _TOKEN_TIMES
    ),
    "e2e_request_latency_seconds": HistogramKind("Seconds from arrival to the end of a complete request.", _LATENCIES),
    "request_queue_time_seconds": HistogramKind("Seconds that a complete request waited to be computed.", _LATENCIES),
    "request_prefill_time_seconds": HistogramKind(
        "Seconds from a complete request's first step to its first token.", _LATENCIES
    ),
    "request_decode_time_seconds": HistogramKind(
        "Seconds from a complete request's first token to its last.", _LATENCIES
    ),
    "request_inference_time_seconds": HistogramKind(
        "Seconds from a complete request's first step to its last token.", _LATENCIES
    ),
    "request_prompt_tokens": HistogramKind("Tokens of a complete request's prompt.", _UP_TO_MODEL_LEN),
    "request_generation_tokens": HistogramKind("Tokens of a complete request's outputs.", _UP_TO_MODEL_LEN),
    "request_max_num_generation_tokens": HistogramKind(
        "Tokens of a complete request's longest output.", _UP_TO_MODEL_LEN
    ),
    "request_params_n": HistogramKind("The parameter n of an accepted request.", (1, 2, 5, 10, 20)),
    "request_params_max_tokens": HistogramKind(
        "The parameter max_tokens of an accepted request that has it.", _UP_TO_MODEL_LEN
    ),
}
COUNTERS = {
    "requests_accepted": CounterKind("Requests that the engine took; a prompt is a request."),
    "request_success": CounterKind(
        "Requests that ended without an error; length outweighs stop where the outputs differ.",
        ("finished_reason",),
        (("stop",), ("length",), ("abort",)),
    ),
    "request_failure": CounterKind(
        "Accepted requests that ended with an error.", ("reason",), (("error",), ("timeout",))
    ),
    "request_refused": CounterKind(
        "HTTP requests for generation that were answered with an error before anything was generated.",
        ("reason",),
        (("invalid",), ("unauthorized",), ("not_found",), ("too_large",), ("queue_full",), ("unavailable",)),
    ),
    "prompt_tokens": CounterKind("Tokens of the prompts of requests that got a token, cached ones included."),
    "generation_tokens": CounterKind("Tokens that were generated and accepted."),
    "requests_resumed": CounterKind(
        "Open requests that went on after a failure, once for each.", ("process",), (("worker",), ("scheduler",))
    ),
    "front_end_restarts": CounterKind("Front ends that were started in place of dead ones."),
    "http_requests": CounterKind("HTTP requests answered.", ("method", "handler", "status"), ()),
}
REFUSALS = {
    400: "invalid",
    401: "unauthorized",
    404: "not_found",
    413: "too_large",
    429: "queue_full",
    503: "unavailable",
}


def model_len_bounds(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 … as far as `max_model_len`."""
    bounds = (digit * 10**power for power in itertools.count() for digit in (1, 2, 5))
    return tuple(itertools.takewhile(lambda bound: bound <= max_model_len, bounds))


class Histogram:
    """How many values lie in each bucket, each up to and including its bound, the last without one; and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times


class Numbers:
    """All histograms and counters of a front end, or of several together."""

    def __init__(self, max_model_len: int) -> None:
        lengths = model_len_bounds(max_model_len)
        self.histograms = {name: Histogram(kind.bounds or lengths) for name, kind in HISTOGRAMS.items()}
        self.counters: dict[str, dict[tuple[str, ...], int]] = {
            name: dict.fromkeys(kind.known, 0) for name, kind in COUNTERS.items()
        }

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Add to a counter; `labels` in the order of its kind."""
        values = self.counters[name]
        values[labels] = values.get(labels, 0) + by

    def add(self, data: dict[str, Any]) -> None:
        """Add what another's `to_dict` told."""
        for name, (counts, total) in data["histograms"].items():
            mine = self.histograms[name]
            mine.counts = [one + other for one, other in zip(mine.counts, counts, strict=True)]
            mine.total += total
        for name, values in data["counters"].items():
            for labels, value in values:
                self.count(name, *labels, by=value)

    @property
    def num_open(self) -> int:
        """Requests that were accepted and did not end."""
        ended = (*self.counters["request_success"].values(), *self.counters["request_failure"].values())
        return self.counters["requests_accepted"][()] - sum(ended)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only."""
        return {
            "histograms": {name: [each.counts, each.total] for name, each in self.histograms.items()},
            "counters": {name: [[list(key), value] for key, value in each.items()] for name, each in
                         self.counters.items()},
        }  # fmt: skip


def _ignore() -> None:
    pass


class ServerMetrics(RequestRecorder):
    """Counts one front end's requests.

    Attributes:
        num_open: accepted and not ended yet.
        on_change: called when anything but a token was counted.
    """

    def __init__(self, max_model_len: int) -> None:
        self.numbers = Numbers(max_model_len)
        self.num_open = 0
        self.on_change: Callable[[], None] = _ignore

    def accepted(self, journal: RequestJournal) -> None:
        self.num_open += 1
        self.numbers.count("requests_accepted")
        self._observe("request_params_n", journal.params.n)
        if journal.params.max_tokens is not None:
            self._observe("request_params_max_tokens", journal.params.max_tokens)
        self.on_change()

    def got_tokens(self, journal: RequestJournal, sequence: SequenceJournal, num_tokens: int, now: float) -> None:
        self.numbers.counters["generation_tokens"][()] += num_tokens
        if sequence.last_token_time is not None:
            # Several at once were on their way together; each took its share of the time.
            gap = max(0.0, now - sequence.last_token_time)
            self._observe("inter_token_latency_seconds", gap / num_tokens, num_tokens)
        elif journal.metrics.first_token_time is None:
            self.numbers.count("prompt_tokens", by=journal.num_prompt_tokens)
            self._observe("time_to_first_token_seconds", max(0.0, now - journal.metrics.arrival_time))

    def resumed(self, num_requests: int) -> None:
        self.numbers.count("requests_resumed", "scheduler", by=num_requests)
        self.on_change()

    def ended(self, journal: RequestJournal) -> None:
        self.num_open -= 1
        reasons = {sequence.finish_reason for sequence in journal.sequences}
        if journal.failure is not None:
            is_late = isinstance(journal.failure, RequestTimeoutError)
            self.numbers.count("request_failure", "timeout" if is_late else "error")
        else:
            reason = next((reason for reason in ("abort", "length") if reason in reasons), "stop")
            self.numbers.count("request_success", reason)
            if reason != "abort":
                self._complete(journal)
        self.on_change()

    def answered(self, method: str, handler: str, status: int, is_generation: bool) -> None:
        """An HTTP request was answered; `handler` is the route's pattern, which no client can invent."""
        self.numbers.count("http_requests", method, handler, str(status))
        if is_generation and status in REFUSALS:
            self.numbers.count("request_refused", REFUSALS[status])
        self.on_change()

    def _complete(self, journal: RequestJournal) -> None:
        shown = journal.output().metrics
        self._observe("request_prompt_tokens", journal.num_prompt_tokens)
        self._observe("request_generation_tokens", shown.num_completion_tokens)
        self._observe("request_max_num_generation_tokens", shown.num_generated_tokens)
        self._observe("request_queue_time_seconds", shown.queue_seconds)
        if shown.e2e_seconds is not None:
            self._observe("e2e_request_latency_seconds", max(0.0, shown.e2e_seconds))
        if shown.first_token_time is None or shown.last_token_time is None:
            return
        began = shown.arrival_time + shown.queue_seconds
        self._observe("request_prefill_time_seconds", max(0.0, shown.first_token_time - began))
        self._observe("request_decode_time_seconds", max(0.0, shown.last_token_time - shown.first_token_time))
        self._observe("request_inference_time_seconds", max(0.0, shown.last_token_time - began))
        if shown.tpot is not None:
            self._observe("request_time_per_output_token_seconds", max(0.0, shown.tpot))

    def _observe(self, name: str, value: float, times: int = 1) -> None:
        self.numbers.histograms[name].observe(value, times)
