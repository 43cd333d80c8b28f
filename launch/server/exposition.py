"""`GET /metrics`: a front end's counts and the engine's statistics in Prometheus' format; counts nothing itself.

What concerns the engine (gauges, the prefix cache, preemptions, steps) comes from the scheduler's latest `Stats`, which
is one source however many front ends there are; what concerns requests is the sum over the front ends.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from launch.server.engine import Engine
from launch.server.errors import UNAVAILABLE, ApiError
from launch.server.metrics import COUNTERS, HISTOGRAMS, Numbers, ServerMetrics
from launch.server.shared_numbers import SharedNumbers
from nanoengine.engine_stats import RESTART_REASONS, SCHEDULER_RESTART_REASONS, STEP_TOKEN_BOUNDS
from nanoengine.messages import Stats
from nanoengine.version import __version__

PREFIX = "nanoengine:"
router = APIRouter()

_RESUMED = "requests_resumed"
_NOTHING = Stats(0, 0, steps_by_tokens=[0] * (len(STEP_TOKEN_BOUNDS) + 1))


@router.get("/metrics", include_in_schema=False)
async def metrics(request: Request) -> Response:
    """Everything that is counted, as Prometheus reads it.

    A front end that was started again does not know the engine's totals at first. Answering 0 would look like a new
    engine, and then like a burst.
    """
    if request.app.state.front_dir is not None and request.app.state.engine.stats is None:
        raise ApiError(503, "this front end does not know the engine's totals yet", UNAVAILABLE, code="loading")
    registry: CollectorRegistry = request.app.state.metrics_registry
    encode, content_type = choose_encoder(request.headers.get("accept", ""))
    return Response(encode(registry), headers={"Content-Type": content_type})


def make_registry(engine: Engine, metrics: ServerMetrics, shared: SharedNumbers | None = None) -> CollectorRegistry:
    """What `/metrics` of this app shows; no other app, and nothing global, is in it."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(engine, metrics, shared))
    return registry


class MetricsCollector(Collector):
    """Makes the families anew for each scrape."""

    def __init__(self, engine: Engine, metrics: ServerMetrics, shared: SharedNumbers | None) -> None:
        self._engine, self._metrics, self._shared = engine, metrics, shared
        self._model_name = engine.config.served_model_name

    def collect(self) -> Iterable[Metric]:
        """Every family, in a fixed order; no sample of one is ever missing, an engine that is not there counts 0."""
        stats = self._engine.stats
        if stats is None or not self._engine.is_ready:
            stats = _NOTHING if stats is None else _at_rest(stats)
        yield from self._engine_state(stats)
        yield from self._engine_totals(stats)
        numbers = self._metrics.numbers if self._shared is None else self._shared.sum()
        yield from self._recovery(stats, numbers)
        yield from self._requests(numbers)
        yield from self._facts()

    def _engine_state(self, stats: Stats) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Sequences that are computed.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences that wait to be computed.", stats.num_waiting)
        yield self._gauge("num_requests_swapped", "Sequences that were swapped to the host.", stats.num_swapped)
        usage = stats.num_used_blocks / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of the K/V blocks that sequences hold; 1 is all.", usage)
        family = GaugeMetricFamily(
            PREFIX + "kv_blocks", "K/V blocks by tier and state.", labels=["model_name", "tier", "state"]
        )
        device = stats.num_blocks, stats.num_used_blocks, stats.num_cached_blocks
        host = stats.num_host_blocks, stats.num_used_host_blocks, stats.num_cached_host_blocks
        for tier, (whole, used, cached) in (("device", device), ("host", host)):
            for state, number in (("used", used), ("cached", cached), ("free", whole - used - cached)):
                family.add_metric([self._model_name, tier, state], number)
        yield family

    def _engine_totals(self, stats: Stats) -> Iterator[Metric]:
        missed = stats.num_query_tokens - (stats.num_hit_tokens - stats.num_host_hit_tokens)
        totals = (
            ("prefix_cache_queries", "Tokens that were looked up in the prefix cache.", stats.num_query_tokens),
            ("prefix_cache_hits", "Tokens of those that were found, on the host too.", stats.num_hit_tokens),
            (
                "host_prefix_cache_queries",
                "Tokens that were not on the device.",
                missed if stats.num_host_blocks else 0,
            ),
            ("host_prefix_cache_hits", "Tokens of those that were on the host.", stats.num_host_hit_tokens),
            ("prefill_tokens", "Tokens computed of prompts, and again of outputs.", stats.num_prefill_tokens),
        )
        for name, help, total in totals:
            yield self._counter(name, help, {(): total})
        modes = {("recompute",): stats.num_preemptions - stats.num_swaps, ("swap",): stats.num_swaps}
        yield self._counter("num_preemptions", "Sequences that gave way to others.", modes, ["mode"])
        yield self._histogram(
            "iteration_tokens_total", "Tokens that a step computed.", STEP_TOKEN_BOUNDS,
            stats.steps_by_tokens, stats.num_step_tokens,
        )  # fmt: skip

    def _recovery(self, stats: Stats, numbers: Numbers) -> Iterator[Metric]:
        workers = dict.fromkeys(RESTART_REASONS, 0) | stats.restarts
        told = self._engine.restart_stats
        schedulers = dict.fromkeys(SCHEDULER_RESTART_REASONS, 0) | told.restarts
        for name, help, restarts in (
            ("worker_restarts", "Groups of ranks that were started in place of failed ones.", workers),
            ("scheduler_restarts", "Schedulers that were started in place of failed ones.", schedulers),
        ):
            yield self._counter(name, help, {(reason,): number for reason, number in restarts.items()}, ["reason"])
        yield self._counter(
            "recovery_seconds", "Seconds from each failure until the engine served again.",
            {("worker",): stats.recovery_seconds, ("scheduler",): told.seconds}, ["process"],
        )  # fmt: skip
        resumed = numbers.counters[_RESUMED] | {("worker",): stats.num_requests_resumed}
        yield self._counter(_RESUMED, COUNTERS[_RESUMED].help, resumed, COUNTERS[_RESUMED].labels)
        totals = (
            ("tokens_recomputed", "Tokens whose keys and values were lost with ranks.", stats.num_tokens_recomputed),
            ("requests_condemned", "Requests that ended because ranks fail of them.", stats.num_requests_condemned),
            ("steps_given_up", "Steps that found no memory and were computed again.", stats.num_steps_given_up),
            ("scheduler_faults", "Faults of the scheduler, each the end of its books.", stats.num_scheduler_faults),
            ("frames_rejected", "Frames and messages that were refused.", stats.num_frames_rejected),
        )
        for name, help, total in totals:
            yield self._counter(name, help, {(): total})

    def _requests(self, numbers: Numbers) -> Iterator[Metric]:
        for name, histogram in numbers.histograms.items():
            help = HISTOGRAMS[name].help
            yield self._histogram(name, help, histogram.bounds, histogram.counts, histogram.total)
        for name, values in numbers.counters.items():
            if name == _RESUMED:
                continue  # shown with what the scheduler counts of it
            yield self._counter(name, COUNTERS[name].help, values, COUNTERS[name].labels)

    def _facts(self) -> Iterator[Metric]:
        config = self._engine.config
        facts = {
            "version": __version__,
            "tensor_parallel_size": config.parallel.tensor_parallel_size,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.scheduler.max_num_seqs,
            "block_size": config.cache.block_size,
        }
        family = GaugeMetricFamily(
            PREFIX + "build_info", "Always 1; what serves is in the labels.", labels=["model_name", *facts]
        )
        family.add_metric([self._model_name, *map(str, facts.values())], 1)
        yield family
        yield self._gauge("engine_ready", "1 while requests are served, else 0.", int(self._engine.is_ready))

    # -- families -----------------------------------------------------------------------------------------------

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
        family.add_metric([self._model_name], value)
        return family

    def _counter(self, name: str, help: str, values: Mapping[Any, float], labels: Iterable[str] = ()) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help, labels=["model_name", *labels])
        for key, value in values.items():
            family.add_metric([self._model_name, *key], value)
        return family

    def _histogram(self, name: str, help: str, bounds: tuple[float, ...], counts: list[int], total: float) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, help, labels=["model_name"])
        uppers = [*(str(float(bound)) for bound in bounds), "+Inf"]
        family.add_metric([self._model_name], list(zip(uppers, itertools.accumulate(counts), strict=True)), total)
        return family


def _at_rest(stats: Stats) -> Stats:
    """The totals of an engine that is gone: nothing runs in it and nothing lies in its cache any more."""
    return dataclasses.replace(
        stats, num_running=0, num_waiting=0, num_swapped=0, num_used_blocks=0, num_cached_blocks=0,
        num_used_host_blocks=0, num_cached_host_blocks=0,
    )  # fmt: skip
