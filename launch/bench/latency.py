"""Figures of a load: percentiles, throughput, goodput, errors by kind; knows records, not where they come from."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from configs.errors import ConfigError
from launch.bench.figures import percentile, table
from launch.bench.load import LoadResult, Record

LATENCIES = ("ttft", "tpot", "itl", "e2e")
_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def parse_goals(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` as milliseconds by name. Raises ConfigError."""
    goals = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = -1.0
        if name not in ("ttft", "tpot", "e2e") or not goals[name] > 0:
            raise ConfigError(f"--goodput takes ttft:MS, tpot:MS and e2e:MS, got {pair!r}", "goodput")
    return goals


def figures(result: LoadResult, goals: Mapping[str, float]) -> dict[str, Any]:
    """What a run showed; latencies in milliseconds (None where nothing was measured), throughput a second.

    Latencies and tokens are those of the requests that were completed. `goals` are latencies in milliseconds; goodput
    counts the requests that meet all of them.
    """
    done = [record for record in result.records if record.error_kind is None]
    seconds = result.seconds or float("nan")
    input_tokens = sum(record.input_tokens for record in done)
    output_tokens = sum(record.output_tokens for record in done)
    summary: dict[str, Any] = {
        "sent": len(result.records),
        "completed": len(done),
        "failed": len(result.records) - len(done),
        "errors": _errors(result.records),
        "finish_reasons": dict(collections.Counter(str(record.finish_reason) for record in done)),
        "interrupted": result.interrupted,
        "seconds": round(result.seconds, 4),
        "input_tokens": input_tokens,
        "cached_tokens": sum(record.cached_tokens for record in done),
        "output_tokens": output_tokens,
        "short_answers": sum(record.output_tokens < record.requested_tokens for record in done),
        "requests_per_s": round(len(done) / seconds, 4),
        "input_tokens_per_s": round(input_tokens / seconds, 2),
        "output_tokens_per_s": round(output_tokens / seconds, 2),
        "total_tokens_per_s": round((input_tokens + output_tokens) / seconds, 2),
        "peak_concurrency": result.peak_concurrency,
        **{f"{name}_ms": _spread(values) for name, values in latencies(done).items()},
        "max_lag_ms": round(1e3 * max((record.lag for record in result.records), default=0.0), 3),
        "client_cpu_share": round(result.client_cpu_share, 4),
    }
    if goals:
        good = sum(_is_good(record, goals) for record in done)
        summary["goodput"] = {"goals_ms": dict(goals), "good": good, "requests_per_s": round(good / seconds, 4)}
    return summary


def latencies(records: Iterable[Record]) -> dict[str, list[float]]:
    """The values of each latency in seconds: one a request, of ITL one a gap."""
    records = list(records)
    return {
        "ttft": [record.ttft for record in records if record.ttft is not None],
        "tpot": [tpot for record in records if (tpot := record.tpot) is not None],
        "itl": [gap for record in records for gap in record.gaps],
        "e2e": [record.last for record in records if record.last is not None],
    }


def _spread(values: Iterable[float]) -> dict[str, float | None]:
    ordered = sorted(values)
    if not ordered:
        return dict.fromkeys(("mean", *_SHARES))
    found = {"mean": sum(ordered) / len(ordered)}
    found |= {name: percentile(ordered, share) for name, share in _SHARES.items()}
    return {name: round(1e3 * value, 3) for name, value in found.items()}


def _errors(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """How often each kind came, and the first message of it."""
    errors: dict[str, dict[str, Any]] = {}
    for record in records:
        if record.error_kind is not None:
            entry = errors.setdefault(record.error_kind, {"count": 0, "first": record.error})
            entry["count"] += 1
    return errors


def _is_good(record: Record, goals: Mapping[str, float]) -> bool:
    values = {"ttft": record.ttft, "tpot": record.tpot, "e2e": record.last}
    # A request of one token has no TPOT, which no goal can be missed by.
    return all(value is None or 1e3 * value <= goals[name] for name, value in values.items() if name in goals)


# -- for a reader -----------------------------------------------------------------------------------------------


def render(summary: Mapping[str, Any]) -> str:
    """One run: throughput, a table of latencies, errors."""
    cached = f" ({summary['cached_tokens']} of them cached)" if summary["cached_tokens"] else ""
    lines = [
        f"{summary['completed']} of {summary['sent']} requests completed in {summary['seconds']:.2f} s, "
        f"up to {summary['peak_concurrency']} at once",
        f"tokens in {summary['input_tokens']}{cached}, out {summary['output_tokens']}",
        f"a second: {summary['requests_per_s']:.2f} requests, {summary['input_tokens_per_s']:.0f} tokens in, "
        f"{summary['output_tokens_per_s']:.0f} out, {summary['total_tokens_per_s']:.0f} in all",
    ]
    if "goodput" in summary:
        goals = ", ".join(f"{name} {value:g} ms" for name, value in summary["goodput"]["goals_ms"].items())
        lines.append(f"goodput: {summary['goodput']['requests_per_s']:.2f} requests a second within {goals}")
    columns = ("mean", *_SHARES)
    rows = [[name.upper(), *(_number(summary[f"{name}_ms"][column]) for column in columns)] for name in LATENCIES]
    lines += ["", table(["ms", *columns], rows), *render_errors(summary)]
    return "\n".join(lines)


def render_errors(summary: Mapping[str, Any]) -> list[str]:
    """A line for each kind of error, and for what makes the figures doubtful."""
    lines = [f"{entry['count']} x {kind}: {entry['first']}" for kind, entry in summary["errors"].items()]
    if summary["short_answers"]:
        lines.append(
            f"{summary['short_answers']} answers are shorter than asked for: the model ended them (--ignore-eos?)"
        )
    if summary["client_cpu_share"] > 0.8:
        lines.append(
            f"this client used {summary['client_cpu_share']:.0%} of a core: it may be the bottleneck, not the server"
        )
    return ["", *lines] if lines else []


def render_sweep(name: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> str:
    """A line for each value of what was swept; latencies in ms as p50/p90/p99."""
    header = [name, "done", "failed", "requests/s", "tokens/s in", "out", "at once", "TTFT", "TPOT", "ITL", "E2E"]
    rows = []
    for value, summary in points:
        speeds = [f"{summary['requests_per_s']:.2f}"]
        speeds += [f"{summary[f'{kind}_tokens_per_s']:.0f}" for kind in ("input", "output")]
        times = ["/".join(_number(summary[f"{each}_ms"][share]) for share in _SHARES) for each in LATENCIES]
        counts = [summary["completed"], summary["failed"]]
        rows.append([f"{value:g}", *counts, *speeds, summary["peak_concurrency"], *times])
    return table(header, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
