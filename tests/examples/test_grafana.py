"""The Grafana dashboard asks for metrics that exist, by labels that they have, and leaves none out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "examples/grafana/nanoengine.json").read_text(encoding="utf-8"))
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def metrics() -> dict[str, list[str]]:
    """Labels of each series, by its name, from the list to which `/metrics` is held."""
    lines = (ROOT / "tests/launch/metrics.txt").read_text(encoding="utf-8").splitlines()
    found = {}
    for name, kind, *rest in (line.split() for line in lines if not line.startswith("#")):
        labels = ["model_name", "le"] if kind == "histogram" else rest
        found |= {f"nanoengine:{name}{suffix}": labels for suffix in SUFFIXES[kind]}
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def test_every_metric_that_is_asked_for_exists_and_every_one_is_asked_for() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"nanoengine:\w+", expression)}
    assert asked <= metrics().keys()
    without_suffix = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert without_suffix >= {re.sub(r"_(bucket|sum|count)$", "", name) for name in metrics()}


def test_labels_are_those_of_the_metric() -> None:
    for expression in expressions():
        labels = {label for name in re.findall(r"nanoengine:\w+", expression) for label in metrics()[name]}
        used = set(re.findall(r"(\w+)=~?\"", expression))
        used |= {label.strip() for group in re.findall(r"by \((.*?)\)", expression) for label in group.split(",")}
        assert used <= labels, expression
        assert "model_name" in used, expression
        assert expression.count("(") == expression.count(")"), expression


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_configuration_names_the_default_address() -> None:
    (job,) = yaml.safe_load((ROOT / "examples/grafana/prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
