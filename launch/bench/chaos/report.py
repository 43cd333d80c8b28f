"""What a chaos run showed: counts, recoveries, trends, whether the server's own counts agree, and every problem.

It asks nobody anything: it is handed what clients, faults and watch have noted.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from launch.bench.chaos.clients import Outcome, Record
from launch.bench.chaos.watch import Sample, Trend, trends
from launch.bench.figures import percentile, table

PREFIX = "nanoengine:"
_SHOWN_PROBLEMS, _SHOWN_SAMPLES = 20, 10
_MIB = 2**20
_RECOVERIES = frozenset(
    {
        "worker_restarts", "scheduler_restarts", "front_end_restarts", "recovery_seconds", "requests_resumed",
        "tokens_recomputed", "requests_condemned", "frames_rejected",
    }
)  # fmt: skip


@dataclasses.dataclass
class Notes:
    """Everything that was noted of a run.

    Attributes:
        record: of all requests, those of the undisturbed pass included.
        seconds: between the first fault's turn and the last.
        faults: how often each came.
        hits: when those came that ended processes.
        recoveries: seconds from each of them until requests were taken again.
        samples: of the server's processes.
        metrics: `/metrics` when nothing was open any more; empty when it could not be asked.
        problems: what went wrong beside requests.
    """

    record: Record
    seconds: float = 0.0
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    hits: list[float] = dataclasses.field(default_factory=list)
    recoveries: list[float] = dataclasses.field(default_factory=list)
    samples: list[Sample] = dataclasses.field(default_factory=list)
    metrics: str = ""
    problems: list[str] = dataclasses.field(default_factory=list)
    interrupted: bool = False


def figures(notes: Notes) -> dict[str, Any]:
    """Everything of a run as JSON takes it; `problems` is empty when all was as it should be."""
    outcomes = notes.record.outcomes
    bad = [outcome for outcome in outcomes if not outcome.is_good]
    counted, disagreements = reconcile(notes.metrics, notes.record)
    recovered = recoveries(notes.metrics)
    if condemned := recovered.get("requests_condemned", 0):
        disagreements.append(f"{condemned:g} requests were given up as what ranks fail of, and none is")
    found = trends(notes.samples)
    problems = [*notes.problems, *disagreements, *map(_sentence, bad)]
    problems += [
        _growth(role, name, trend) for role, each in found.items() for name, trend in each.items() if not trend.is_flat
    ]
    return {
        "seconds": round(notes.seconds, 1),
        "interrupted": notes.interrupted,
        "requests": len(outcomes),
        "tokens_compared": sum(outcome.num_tokens for outcome in outcomes),
        "results": dict(collections.Counter(outcome.result for outcome in outcomes)),
        "by_kind": _crossed(outcomes, lambda outcome: outcome.case.kind),
        "by_way": _crossed(outcomes, lambda outcome: outcome.way),
        "refusals": dict(notes.record.refusals),
        "faults": dict(sorted(notes.faults.items())),
        "recovery_seconds": spread(notes.recoveries),
        "stream_silence_seconds": spread(silences(outcomes, notes.hits)),
        "trends": {role: {name: trend.to_dict() for name, trend in each.items()} for role, each in found.items()},
        "samples": [dataclasses.asdict(sample) for sample in notes.samples],
        "metrics": counted,
        "recoveries": recovered,
        "problems": problems,
    }


def _crossed(outcomes: Sequence[Outcome], key: Any) -> dict[str, dict[str, int]]:
    """How often each result came, by something else."""
    found: dict[str, collections.Counter[str]] = {}
    for outcome in outcomes:
        found.setdefault(key(outcome), collections.Counter())[outcome.result] += 1
    return {name: dict(sorted(counts.items())) for name, counts in sorted(found.items())}


def _sentence(outcome: Outcome) -> str:
    case = outcome.case
    return f"{outcome.result}: {case.kind}, {outcome.way}, {outcome.request_id} on {case.path}: {outcome.detail}"


def _growth(role: str, name: str, trend: Trend) -> str:
    unit, scale = _units(name)
    allowed = f"{(trend.allowed or 0) / scale:.1f}{unit}"
    return f"{name} of {role} grew by {trend.growth / scale:.1f}{unit} over the run; at most {allowed} is allowed"


def _units(name: str) -> tuple[str, int]:
    return (" MiB", _MIB) if name == "memory" else ("", 1)


def silences(outcomes: Sequence[Outcome], hits: Sequence[float]) -> list[float]:
    """The longest silence of each stream that was open when processes were ended, in seconds."""
    return [
        outcome.silence
        for outcome in outcomes
        if outcome.silence and any(outcome.began <= hit <= outcome.ended for hit in hits)
    ]


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Count, median, 99th percentile and largest; the count alone when there are none."""
    ordered = sorted(values)
    if not ordered:
        return {"count": 0}
    shares = {"p50": 0.5, "p99": 0.99, "max": 1.0}
    return {"count": len(ordered)} | {name: round(percentile(ordered, share), 3) for name, share in shares.items()}


def reconcile(text: str, record: Record) -> tuple[dict[str, float], list[str]]:
    """The server's counts of requests, and where they disagree with each other or with what clients saw.

    A request that was broken off by its client may have been accepted or not; all others were. Where several are asked
    for at once, one that ends before its time ends the others, which are aborted unless they have ended before.
    """
    if not text:
        return {}, []
    counted = _counts(text)
    accepted, ended = counted["accepted"], sum(value for name, value in counted.items() if name != "accepted")
    seen: collections.Counter[str] = collections.Counter()
    least: collections.Counter[str] = collections.Counter()
    for outcome in record.outcomes:
        seen[outcome.result] += outcome.case.num_requests
        least[outcome.result] += 1
    along = sum(seen[result] - least[result] for result in ("timed out", "failed"))
    answered = sum(count for result, count in seen.items() if result not in ("dropped", "refused", "stuck"))
    problems = []
    if accepted != ended:
        problems.append(f"/metrics: {accepted:g} requests were accepted, but {ended:g} ended: {counted}")
    if not answered <= accepted <= answered + record.num_unsure:
        problems.append(
            f"/metrics: {accepted:g} requests were accepted, but clients saw the end of {answered} and broke off "
            f"{record.num_unsure}"
        )
    for name, result in (("timeout", "timed out"), ("abort", "aborted"), ("error", "failed")):
        most = seen[result] + record.num_unsure + (along if name == "abort" else 0)
        if not least[result] <= counted[name] <= most:
            problems.append(f"/metrics: {counted[name]:g} requests ended with {name}, but clients saw {seen[result]}")
    return counted, problems


def recoveries(text: str) -> dict[str, float]:
    """What the server counted of its recoveries, each name with its labels' values behind it, less what is 0."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        name = family.name.removeprefix(PREFIX)
        for sample in family.samples if name in _RECOVERIES else ():
            labels = "".join(f" {value}" for label, value in sample.labels.items() if label != "model_name")
            if sample.value:
                found[name + labels] = sample.value
    return found


def _counts(text: str) -> dict[str, float]:
    names = {
        "requests_accepted_total": None,
        "request_success_total": "finished_reason",
        "request_failure_total": "reason",
    }
    found: dict[str, float] = dict.fromkeys(("accepted", "stop", "length", "abort", "error", "timeout"), 0.0)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            if name in names:
                label = names[name]
                key = "accepted" if label is None else sample.labels[label]
                found[key] = found.get(key, 0.0) + sample.value
    return found


# -- for a reader -----------------------------------------------------------------------------------------------


def render(summary: Mapping[str, Any]) -> str:
    """Counts, recoveries and trends as lines and tables, and what was wrong, or that nothing was."""
    results, problems = summary["results"], summary["problems"]
    lines = [
        f"{summary['requests']} requests and {sum(summary['faults'].values())} faults in {summary['seconds']:g} s, "
        f"{summary['tokens_compared']} tokens compared: {_listed(results)}",
        f"wrong {results.get('wrong', 0)}, stuck {results.get('stuck', 0)}, failed {results.get('failed', 0)}",
        f"told to come again: {_listed(summary['refusals'])}",
        f"faults: {_listed(summary['faults'])}",
        f"ready again after a fault that ended processes: {_seconds(summary['recovery_seconds'])}",
        f"longest silence of a stream that was open then: {_seconds(summary['stream_silence_seconds'])}",
        f"counted by the server: {_listed({name: int(value) for name, value in summary['metrics'].items()})}",
        f"and of recoveries: {_listed({name: int(value) for name, value in summary['recoveries'].items()})}",
        "",
        _results_table("kind", summary["by_kind"]),
        "",
        _results_table("way", summary["by_way"]),
        "",
        _samples_table(summary["samples"]),
    ]
    lines += [
        "",
        _trends_table(summary["trends"]),
        "",
        *(f"PROBLEM: {problem}" for problem in problems[:_SHOWN_PROBLEMS]),
    ]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - _SHOWN_PROBLEMS} further problems")
    return "\n".join([*lines, "" if problems else "nothing was wrong"]).rstrip()


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _seconds(told: Mapping[str, float]) -> str:
    if not told["count"]:
        return "none"
    return f"p50 {told['p50']:.2f} s, p99 {told['p99']:.2f} s, largest {told['max']:.2f} s, of {told['count']}"


def _results_table(name: str, crossed: Mapping[str, Mapping[str, int]]) -> str:
    columns = list(dict.fromkeys(result for counts in crossed.values() for result in counts))
    return table(
        [name, *columns], [[key, *(counts.get(each, 0) for each in columns)] for key, counts in crossed.items()]
    )


def _trends_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = []
    for role, trends_of_role in found.items():
        for name, trend in trends_of_role.items():
            unit, scale = _units(name)
            verdict = "began anew" if trend["allowed"] is None else "flat" if trend["flat"] else "GROWS"
            slope = f"{trend['per_minute'] / scale:+.2f}"
            rows.append([role, name + unit, f"{trend['median'] / scale:.1f}", slope, verdict])
    return table(["of", "what", "median", "a minute", "verdict"], rows)


def _samples_table(samples: Sequence[Mapping[str, Any]]) -> str:
    """Some of them, evenly over the run; own memory by role, the rest of all processes."""
    roles = list(dict.fromkeys(role for each in samples for role in each["pids"]))
    shown = [samples[number * (len(samples) - 1) // max(1, _SHOWN_SAMPLES - 1)] for number in range(_SHOWN_SAMPLES)]
    rows = [
        [
            f"{each['seconds']:.0f}",
            sum(map(len, each["pids"].values())),
            f"{sum(each['pss'].values()) / _MIB:.0f}",
            *(f"{each['memory'].get(role, 0) / _MIB:.0f}" for role in roles),
            sum(each["descriptors"].values()),
            sum(each["threads"].values()),
        ]
        for each in (shown if len(samples) > _SHOWN_SAMPLES else samples)
    ]
    header = ["s", "processes", "PSS MiB", *(f"{role} MiB" for role in roles), "descriptors", "threads"]
    return table(header, rows)
