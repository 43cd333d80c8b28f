"""The latency-throughput curve of a sweep as a PNG; knows figures, and imports matplotlib only to draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import ConfigError

_PANELS = {"ttft": "time to first token", "tpot": "time per output token"}
_LINES = {"p50": "-o", "p90": "--s", "p99": ":^"}


def check(path: Path) -> None:
    """Raise ConfigError when nothing can be drawn there; before minutes are spent on what is to be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed: pip install matplotlib", "plot")
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--plot writes a PNG: the file's name must end in .png, got {str(path)!r}", "plot")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.parent}", "plot")


def draw(path: Path, title: str, name: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    """Latencies over output tokens a second, a panel for TTFT and one for TPOT; each point says what was swept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no pyplot: it holds state and looks for a display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=8)
    measured = [(value, summary) for value, summary in points if summary["completed"]]
    for axes, (latency, words) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
        for share, style in _LINES.items():
            known = [(s, value) for value, s in measured if s[f"{latency}_ms"][share] is not None]
            x = [summary["output_tokens_per_s"] for summary, _ in known]
            y = [summary[f"{latency}_ms"][share] for summary, _ in known]
            axes.plot(x, y, style, label=share, markersize=4)
            if share == "p50":
                for (_, value), *place in zip(known, x, y, strict=True):
                    axes.annotate(f"{value:g}", place, textcoords="offset points", xytext=(4, 4), fontsize=8)
        axes.set(xlabel="output tokens a second", ylabel=f"{words}, ms", title=f"{latency.upper()} by {name}")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
