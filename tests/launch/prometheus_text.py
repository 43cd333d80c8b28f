"""Reads what `/metrics` answers."""

from __future__ import annotations

from collections import defaultdict

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

PREFIX = "nanoengine:"


def families(text: str) -> dict[str, Metric]:
    """By name, less the prefix."""
    return {family.name.removeprefix(PREFIX): family for family in text_string_to_metric_families(text)}


def total(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of that name (with `_total`, `_count` and so on) whose labels are these."""
    samples = [
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == PREFIX + name and labels.items() <= sample.labels.items()
    ]
    assert samples, f"there is no {name} with {labels}"
    return sum(samples)


def by_label(text: str, name: str, label: str) -> dict[str, float]:
    """The samples of that name, added up by a label's value."""
    found: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == PREFIX + name:
                found[sample.labels[label]] += sample.value
    return dict(found)
