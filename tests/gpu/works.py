"""What every engine is given to do, which part of it where there is no time for all, and what the machine allows.

The work of issue 7: the benchmark that nano-vllm made common, decode of one stream and of 64, and a long prompt. All
requests are handed over at once, their ends of sequence ignored. It knows no engine.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from launch.bench.throughput import MAX_TOKEN_ID, Workload
from tests.gpu.checkpoints import Shape

Generate = Callable[[list[list[int]], list[int], float], list[int]]
"""(prompts, tokens to answer each with, temperature) to the number of tokens that came for each."""

SHARES = (1.0, 0.5, 0.25, 0.125)
"""Of a work: the largest is done for which there is time."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Requests that are measured together.

    Attributes:
        name: in options and result files.
        title: in the table.
        counts_input: whether the figure is prompt tokens a second, not output tokens.
        is_long: needs room for 9,000 tokens a sequence; the other one runs with an engine's defaults.
    """

    name: str
    title: str
    requests: Workload
    temperature: float = 0.0
    counts_input: bool = False
    is_long: bool = True

    def draw(self, attempt: int, vocab_size: int, share: float = 1.0) -> tuple[list[list[int]], list[int]]:
        """Prompts and the lengths of the answers; other ids in each attempt, so that no cache helps.

        A share of many requests is the first ones; of few, it is the first tokens of each answer.
        """
        limit = min(MAX_TOKEN_ID + 1, vocab_size)
        prompts, lengths = self.requests.draw()
        if len(prompts) > 64:
            number = max(1, round(share * len(prompts)))
            prompts, lengths = prompts[:number], lengths[:number]
        else:
            lengths = [max(1, round(share * length)) for length in lengths]
        return [[(token + 7 * attempt) % limit for token in prompt] for prompt in prompts], lengths

    @property
    def is_divisible(self) -> bool:
        """Whether there are shares of it."""
        return not self.counts_input

    @property
    def unit(self) -> str:
        """Of the figure."""
        return "tokens/s in" if self.counts_input else "tokens/s out"


def works(small: bool = False) -> list[Work]:
    """All of them, those with one setting side by side; `small` ones try the program, on a CPU."""
    if small:
        return [
            Work("single", "decode, 1 stream", Workload(1, (4, 4), (8, 8))),
            Work("streams", "decode, 4 streams", Workload(4, (8, 8), (8, 8))),
            Work("prefill", "prefill of 64 tokens", Workload(1, (64, 64), (1, 1)), counts_input=True),
            Work("bench", "the benchmark, tiny", Workload(72, (2, 8), (2, 8)), 0.6, is_long=False),
        ]
    return [
        Work("single", "decode, 1 stream, 16 + 512 tokens", Workload(1, (16, 16), (512, 512))),
        Work("streams", "decode, 64 streams, 128 + 512 tokens", Workload(64, (128, 128), (512, 512))),
        Work("prefill", "prefill of 8,192 tokens", Workload(1, (8192, 8192), (1, 1)), counts_input=True),
        Work("bench", "nano-vllm's benchmark, 256 requests", Workload(), 0.6, is_long=False),
    ]


def measure(
    work: Work,
    generate: Generate,
    vocab_size: int,
    seconds: float,
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Do as much of a work as fits into `seconds`, by what an eighth of it takes, and tell the best figure.

    The first eighth also compiles and does not count. When time is up, no further run begins; one under way ends.

    Returns:
        `figure` in the work's unit, `share` of it that was done, `runs`, and `seconds` of the best of them.
    """
    began, attempt = clock(), 0
    least = SHARES[-1] if work.is_divisible else 1.0

    def once(share: float) -> tuple[float, float]:
        nonlocal attempt
        # The first run that counts has the ids of seed 0 as they are.
        prompts, lengths = work.draw(attempt - 1 if attempt else 1_000, vocab_size, share)
        attempt += 1
        start = clock()
        made = generate(prompts, lengths, work.temperature)
        taken = clock() - start
        if made != lengths:
            raise ValueError(f"answers of {made[:4]} … tokens instead of {lengths[:4]} …")
        return (sum(map(len, prompts)) if work.counts_input else sum(lengths)) / taken, taken

    once(least)
    figure, taken = once(least)
    left = seconds - (clock() - began)
    # Larger batches are faster a token, so this errs to the side of doing less.
    share = next((each for each in SHARES if work.is_divisible and taken * each / least <= left), least)
    runs = [(figure, taken)] if share == least else []
    while len(runs) < repeats and (not runs or clock() - began + runs[-1][1] <= seconds):
        runs.append(once(share))
    figure, taken = max(runs)
    return {"figure": figure, "share": share, "runs": len(runs), "seconds": taken}


def share_of_limit(work: Work, shape: Shape, figure: float, bandwidth: float, rate: float, share: float = 1.0) -> float:
    """What part of the machine's limit a figure is: of its bandwidth, for a prompt of its matrix rate.

    Args:
        bandwidth: bytes a second that a copy moves, reading and writing.
        rate: operations a second of a large bfloat16 product.
        share: of the work that was done.
    """
    prompts, lengths = work.draw(0, shape.vocab_size, share)
    num_in, num_out, num = sum(map(len, prompts)), sum(lengths), len(prompts)
    if work.counts_input:
        # Each token multiplies all matrices; attention is two products over half the keys on average.
        attention = 2 * (num_in / num) * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
        return figure * (2 * shape.layer_parameters + attention) / rate
    keys = sum(length * len(prompt) + length * length / 2 for prompt, length in zip(prompts, lengths, strict=True))
    bytes_per_token = shape.kv_bytes * keys / num_out
    if work.is_long:  # each step reads all weights; the benchmark's limit is told without them, as issue 7 does
        bytes_per_token += 2 * (shape.layer_parameters + shape.head_parameters) / num
    return figure * bytes_per_token / bandwidth
