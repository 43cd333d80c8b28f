"""Invented traces of requests: when each arrives, how long it is, and what it shares with others; knows no engine.

Lengths are heavy-tailed (log-normal). Arrivals are Poisson, or bursty: a gamma process whose gaps vary four times as
much, so that requests come in clumps. Some requests start with one of a few system prompts, of Zipf popularity.
A share of them may be urgent. A trace is drawn as it is read: a million requests take no memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator

BURSTY_CV = 4.0
"""Coefficient of variation of the gaps of bursty arrivals (1 for Poisson)."""

# Every request's own tokens, and every system prompt, count up from a number of their own: no two agree by chance.
_OWN_TOKENS = 2**20


@dataclasses.dataclass(frozen=True)
class TraceSpec:
    """What a trace looks like. Lengths are medians, in tokens; `*_sigma` are of the lengths' logarithms."""

    num_requests: int = 10_000
    rate: float = 10.0
    arrivals: str = "poisson"
    prompt_median: int = 200
    prompt_sigma: float = 1.0
    output_median: int = 60
    output_sigma: float = 1.0
    max_prompt: int = 4096
    max_output: int = 1024
    prefix_share: float = 0.5
    num_prefixes: int = 32
    prefix_length: int = 256
    urgent_share: float = 0.0
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request: `arrival` in seconds from the start; it ends after exactly `num_output_tokens`.

    `priority` is -1 for an urgent one, else 0.
    """

    number: int
    arrival: float
    prompt_token_ids: list[int]
    num_output_tokens: int
    priority: int = 0


def generate(spec: TraceSpec) -> Iterator[TracedRequest]:
    """The requests in order of arrival; the same for the same spec."""
    rng = random.Random(spec.seed)
    urgency = random.Random(spec.seed + 1)  # of its own: who is urgent changes nothing else of a trace
    # A gamma of shape 1 is exponential; a smaller shape makes many short gaps and a few long ones.
    shape = 1.0 if spec.arrivals == "poisson" else 1 / BURSTY_CV**2
    cumulated = list(itertools.accumulate(1 / rank for rank in range(1, spec.num_prefixes + 1)))
    prefixes = range(spec.num_prefixes)
    clock = 0.0
    for number in range(spec.num_requests):
        clock += rng.gammavariate(shape, 1 / (shape * spec.rate))
        length = _length(rng, spec.prompt_median, spec.prompt_sigma, spec.max_prompt)
        first = (1 + spec.num_prefixes + number) * _OWN_TOKENS
        prompt = list(range(first, first + length))
        if rng.random() < spec.prefix_share:
            shared = (1 + rng.choices(prefixes, cum_weights=cumulated)[0]) * _OWN_TOKENS
            prompt[:0] = range(shared, shared + spec.prefix_length)
        num_output_tokens = _length(rng, spec.output_median, spec.output_sigma, spec.max_output)
        priority = -1 if urgency.random() < spec.urgent_share else 0
        yield TracedRequest(number, clock, prompt, num_output_tokens, priority)


def _length(rng: random.Random, median: int, sigma: float, longest: int) -> int:
    return max(1, min(longest, round(rng.lognormvariate(math.log(median), sigma))))
