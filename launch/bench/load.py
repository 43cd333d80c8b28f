"""Plays requests against a server at given times or so many at once, and notes when each token came.

It knows OpenAI's streams and nothing of what becomes of the figures. What is noted, and why so:

* Times count from the sending of a request; with `max_concurrency` it is sent when its turn comes, as in vLLM's bench.
* The first token came with the first chunk that can hold one: the chunk that only opens a chat with a role is not it.
* A gap (inter-token latency, ITL) lies between two chunks, whether they brought one token or several; chunks that
  came in one read of the socket came at the same time. TPOT divides by the tokens and is not misled by that.
* Numbers of tokens are the server's (`usage`), never the number of chunks. A server that does not count is an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable
from typing import Any

from launch.bench.datasets import LoadRequest
from launch.client.api import ApiClient
from launch.client.connection import ClientError

_INTERRUPTED = "interrupted", "the run was broken off"
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclasses.dataclass(slots=True)
class Record:
    """One request. Times in seconds; those that did not come are None. `error_kind` is None when all went well.

    `lag` is how late it was sent after it was due, `last` when its last token came after the sending.
    """

    number: int
    requested_tokens: int
    sent: float = 0.0
    lag: float = 0.0
    ttft: float | None = None
    last: float | None = None
    gaps: list[float] = dataclasses.field(default_factory=list)
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    finish_reason: str | None = None
    error_kind: str | None = None
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean seconds between the tokens that follow the first; None for fewer than two."""
        if self.ttft is None or self.last is None or self.output_tokens < 2:
            return None
        return (self.last - self.ttft) / (self.output_tokens - 1)


@dataclasses.dataclass(frozen=True)
class LoadSpec:
    """How requests are sent and what they ask beside their prompt."""

    model: str
    endpoint: str = "completions"
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    timeout: float = 3600.0
    seed: int = 0
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class LoadResult:
    """Every request that was sent, and the run as a whole. `interrupted`: it did not come to its end."""

    records: list[Record]
    seconds: float = 0.0
    peak_concurrency: int = 0
    client_cpu_share: float = 0.0
    interrupted: bool = False


def due_times(spec: LoadSpec, num_requests: int) -> list[float]:
    """Seconds after the start at which each request is due; the first one at once.

    Gaps are drawn from a gamma distribution of shape `burstiness` (1: exponential, so arrivals are a Poisson process;
    less: in bursts; more: evener), and scaled so that the whole takes (num_requests - 1) / rate, as vLLM's bench does:
    otherwise the rate of a short run would be far from what was asked for.
    """
    if math.isinf(spec.request_rate):
        return [0.0] * num_requests
    rng = random.Random(spec.seed)
    gaps = [rng.gammavariate(spec.burstiness, 1.0) for _ in range(num_requests - 1)]
    total = sum(gaps)
    scale = (num_requests - 1) / spec.request_rate / total if total else 0.0
    return list(itertools.accumulate((gap * scale for gap in gaps), initial=0.0))


async def run_load(
    api: ApiClient, requests: list[LoadRequest], spec: LoadSpec, on_end: Callable[[], object] = lambda: None
) -> LoadResult:
    """Send them all and wait for their ends, telling `on_end` of each.

    Cancelled, it returns what there is; open requests are hung up on.
    """
    result = LoadResult([])
    turns = asyncio.Semaphore(spec.max_concurrency or len(requests))
    num_open, began, began_cpu = 0, time.perf_counter(), time.process_time()

    async def serve(request: LoadRequest, record: Record) -> None:
        nonlocal num_open
        try:
            await play(api, request, spec, record)
        finally:
            num_open -= 1
            turns.release()
        on_end()

    tasks = []
    try:
        for number, (request, due) in enumerate(zip(requests, due_times(spec, len(requests)), strict=True)):
            wait = began + due - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            await turns.acquire()
            sent = time.perf_counter() - began
            record = Record(number, request.output_len, sent, sent - due)
            result.records.append(record)
            num_open += 1
            result.peak_concurrency = max(result.peak_concurrency, num_open)
            tasks.append(asyncio.create_task(serve(request, record)))
        await asyncio.gather(*tasks)
    except asyncio.CancelledError:
        result.interrupted = True
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for record in result.records:
            if record.last is None and record.error_kind is None:  # cancelled before its task had begun
                record.error_kind, record.error = _INTERRUPTED
    result.seconds = time.perf_counter() - began
    result.client_cpu_share = (time.process_time() - began_cpu) / result.seconds
    return result


async def play(api: ApiClient, request: LoadRequest, spec: LoadSpec, record: Record) -> None:
    """Send one request, and note in the record what comes of it, errors included. A cancellation goes on its way."""
    try:
        async with asyncio.timeout(spec.timeout):
            await _read(api, request, spec, record)
    except ClientError as error:
        record.error_kind, record.error = error.kind, error.message
    except TimeoutError:
        record.error_kind, record.error = "timeout", f"not complete after {spec.timeout:g} s"
    except asyncio.CancelledError:
        record.error_kind, record.error = _INTERRUPTED
        raise


async def _read(api: ApiClient, request: LoadRequest, spec: LoadSpec, record: Record) -> None:
    body, usage, count = _body(request, spec), None, 0
    sent = time.perf_counter()
    async with contextlib.aclosing(api.stream(PATHS[spec.endpoint], body)) as stream:
        async for chunks in stream:
            now = time.perf_counter() - sent
            for chunk in chunks:
                usage = chunk.get("usage") or usage
                choices = chunk.get("choices")
                if not choices or (count == 0 and _only_opens(choices[0])):
                    continue
                record.finish_reason = choices[0].get("finish_reason") or record.finish_reason
                if record.ttft is None or record.last is None:
                    record.ttft = now
                else:
                    record.gaps.append(now - record.last)
                record.last = now
                count += 1
    if count == 0:
        raise ClientError("empty answer", "the stream ended without a token")
    if not isinstance(usage, dict) or type(usage.get("completion_tokens")) is not int:
        raise ClientError("no usage", "the server does not say how many tokens it made (stream_options.include_usage)")
    record.output_tokens = usage["completion_tokens"]
    record.input_tokens = usage.get("prompt_tokens") or 0
    record.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _only_opens(choice: dict[str, Any]) -> bool:
    """Whether it is the chunk that names a chat's role: many servers send it before they compute anything."""
    delta = choice.get("delta")
    if not delta or choice.get("finish_reason"):
        return False
    return "role" in delta and not any(value for name, value in delta.items() if name != "role")


def _body(request: LoadRequest, spec: LoadSpec) -> dict[str, Any]:
    body: dict[str, Any] = {"model": spec.model, "stream_options": {"include_usage": True}}
    if spec.endpoint == "completions":
        body |= {"prompt": request.prompt, "max_tokens": request.output_len}
    else:
        messages = request.prompt if request.is_conversation else [{"role": "user", "content": request.prompt}]
        body |= {"messages": messages, "max_completion_tokens": request.output_len}
    return body | spec.fields
