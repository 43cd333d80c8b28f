"""Percentiles of measurements, and tables for a terminal that are also Markdown; knows nothing of what is measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the sorted values lie (nearest rank); nan when there are none."""
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, and the tenth and ninetieth percentiles."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Iterable[float], scale: float = 1) -> Spread:
        """The spread of `values`, multiplied by `scale`."""
        ordered = sorted(values)
        return cls(*(round(percentile(ordered, share) * scale, 1) for share in (0.5, 0.1, 0.9)))

    def __str__(self) -> str:
        return f"{self.median:.0f} ({self.p10:.0f}-{self.p90:.0f})"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, numbers to the right, aligned for a terminal too."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [list(header), ["-" * (width - 1) + ":" for width in widths], *cells]
    return "\n".join("| " + " | ".join(f"{c:>{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
