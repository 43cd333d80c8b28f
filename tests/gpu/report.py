"""Tables of what `run.py` found, and its section in RESULTS.md; knows nothing of how it was measured.

What was found is a dictionary that is kept as JSON, so that parts of it can come from several commands:

    started, commands, machine, limits {bandwidth, rate}, tests, engines {model: {engine: …}}, profiles {model: …}
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from launch.bench.figures import table
from tests.gpu.checkpoints import SHAPES
from tests.gpu.decode_profile import render as render_profile
from tests.gpu.works import Work, share_of_limit, works

RESULTS = Path(__file__).with_name("RESULTS.md")
_HEAD = """# What was measured on GPUs

Written by `python tests/gpu/run.py --record`, the newest first. A ratio is how many times as fast nanoengine is. What
each figure is, README.md beside this file says.
"""
_OWN = "nanoengine"


def heading(found: dict[str, Any]) -> str:
    """Of the section; one for each run, whichever parts of it have come by now."""
    return f"## {found['started']}, {found['machine']['device']}"


def section(found: dict[str, Any]) -> str:
    """All of it, as Markdown."""
    machine, limits = found["machine"], found["limits"]
    parts = [
        heading(found),
        ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device") + ".",
        "\n".join(f"    {command}" for command in found["commands"]),
        f"Copies move {limits['bandwidth'] / 1e12:.3g} TB/s, bfloat16 products do {limits['rate'] / 1e12:.4g} TFLOP/s.",
    ]
    if "tests" in found:
        parts.append(f"Tests: {found['tests']}.")
    if found["engines"]:
        parts.append(engines_table(found))
        parts += notes(found)
    if any(each["idle"] for each in found["profiles"].values()):
        parts.append(idle_table(found))
    for model, each in found["profiles"].items():
        if "error" in each:
            parts.append(f"The profile of {SHAPES[model].name} failed: {each['error']}")
        parts += [render_profile(profile, SHAPES[model].name) for profile in each["profiles"]]
    return "\n\n".join(parts) + "\n"


def engines_table(found: dict[str, Any]) -> str:
    """A row for each work on each model, a column for each engine."""
    names = list(dict.fromkeys(name for engines in found["engines"].values() for name in engines))
    names.sort(key=lambda name: name != _OWN)
    header = [
        "model",
        "what",
        *(word for name in names for word in ([name, "of the limit"] if name == _OWN else [name])),
    ]
    rows = []
    for model, engines in found["engines"].items():
        own = engines.get(_OWN, {})
        for work in works(small=found["machine"]["device"] == "CPU"):
            row = [SHAPES[model].name, f"{work.title}, {work.unit}"]
            for name in names:
                row.append(_cell(engines.get(name), own if name != _OWN else {}, work.name))
                if name == _OWN:
                    row.append(_limit(own, work, model, found["limits"]))
            rows.append(row)
        row = [SHAPES[model].name, "from construction to ready, s"]
        for name in names:
            seconds = engines.get(name, {}).get("load_s")
            row.append("" if seconds is None else f"{seconds:.1f}")
            row += [""] * (name == _OWN)
        rows.append(row)
    return table(header, rows)


def _cell(engine: dict[str, Any] | None, own: dict[str, Any], work: str) -> str:
    if engine is None:
        return ""
    if engine.get("missing"):
        return "not installed"
    measured = engine.get("works", {}).get(work)
    if measured is None:
        return "failed" if "error" in engine else ""
    words = [_short(measured["figure"])]
    if measured["share"] < 1:
        words.append(f"on {measured['share']:g} of it")
    ours = own.get("works", {}).get(work)
    if ours is not None:
        words.append(f"x{ours['figure'] / measured['figure']:.2f}")
    return ", ".join(words)


def _limit(own: dict[str, Any], work: Work, model: str, limits: dict[str, float]) -> str:
    measured = own.get("works", {}).get(work.name)
    if measured is None:
        return ""
    arguments = (limits["bandwidth"], limits["rate"], measured["share"])
    return f"{100 * share_of_limit(work, SHAPES[model], measured['figure'], *arguments):.0f} %"


def notes(found: dict[str, Any]) -> list[str]:
    """Versions of the engines, and what went wrong with them."""
    versions = {
        name: engine["version"]
        for each in found["engines"].values()
        for name, engine in each.items()
        if "version" in engine
    }
    told = [", ".join(f"{name} {version}" for name, version in versions.items()) + "."] if versions else []
    return told + [
        f"{name} on {SHAPES[model].name}: {engine['error']}"
        for model, each in found["engines"].items()
        for name, engine in each.items()
        if "error" in engine
    ]


def idle_table(found: dict[str, Any]) -> str:
    """How long the device idles in steady decode of a whole engine."""
    rows = [
        [
            SHAPES[model].name, each["streams"], each["context"], f"{1e6 * each['step']:.0f}",
            f"{1e6 * each['busy']:.0f}", f"{100 * each['idle']:.1f} %", f"{each['steps']:.0f} and {each['held']:.0f}",
        ]
        for model, profiles in found["profiles"].items()
        for each in profiles["idle"]
    ]  # fmt: skip
    return table(
        ["model", "streams", "tokens each", "step, µs", "device busy, µs", "idle", "steps, and held ones"], rows
    )


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def record(text: str, file: Path = RESULTS) -> None:
    """Put a section into the file: in the place of the one with its heading, else before all others."""
    before = file.read_text(encoding="utf-8") if file.is_file() else _HEAD
    head, *sections = re.split(r"(?m)^(?=## )", before)
    first_line = text.splitlines()[0]
    places = [number for number, each in enumerate(sections) if each.splitlines()[0] == first_line]
    if places:
        sections[places[0]] = text
    else:
        sections.insert(0, text)
    file.write_text("\n".join(part.strip() + "\n" for part in (head, *sections)), encoding="utf-8")
