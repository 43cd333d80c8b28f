"""Measures how long streams wait for their next token while long prompts flood in, under `--max-decode-gap`.

A whole engine with its processes, seen from `LLM`: some streams run alone for a while, which says what a gap between
two tokens is undisturbed, then long prompts that share nothing arrive at once. Gaps are told as multiples of the
undisturbed median of the same engine. Engines with different bounds take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from configs.errors import DeadlineError, EngineError
from launch.bench.figures import percentile, table
from launch.options import new_file, real, whole
from nanoengine import LLM, SamplingParams

ALONE_TOKENS = 100
"""Tokens of each stream before the flood; the first of them, while the engine wakes up, do not count."""
IGNORED_TOKENS = 20
DEADLINE_SECONDS = 600.0


@dataclasses.dataclass
class Gaps:
    """Seconds between two tokens of a stream, of all streams and runs, and how long the floods took."""

    alone: list[float] = dataclasses.field(default_factory=list)
    multiples: list[float] = dataclasses.field(default_factory=list)  # under the flood, of the run's median alone
    flood_seconds: list[float] = dataclasses.field(default_factory=list)


def add_parser(commands: Any) -> None:
    """Declare `decode-gap`."""
    parser = commands.add_parser("decode-gap", help=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="(default: %(default)s)")
    parser.add_argument("--tp", type=whole(1, 64), default=1, help="ranks (default: %(default)s)")
    parser.add_argument("--gaps", type=real(0), nargs="+", default=[0, 3], help="bounds to compare (default: 0 3)")
    parser.add_argument("--streams", type=whole(1), default=4, help="running streams (default: %(default)s)")
    parser.add_argument("--prompts", type=whole(1), default=16, help="prompts that flood in (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=whole(1), default=2000, help="tokens in each (default: %(default)s)")
    parser.add_argument("--runs", type=whole(1), default=3, help="engines of each bound (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the figures to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print."""
    found = {bound: Gaps() for bound in arguments.gaps}
    for number in range(arguments.runs):
        for bound, gaps in found.items():
            if sys.stderr.isatty():
                print(f"run {number + 1}, bound {bound:g} …", file=sys.stderr)
            measure(gaps, arguments, bound, seed=number)
    results = [figures(bound, gaps) for bound, gaps in found.items()]
    print(render(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(gaps: Gaps, arguments: argparse.Namespace, bound: float, seed: int) -> None:
    """Run one engine from its start to the flood's end, and add what was seen to `gaps`."""
    rng = random.Random(seed)
    settings = {"tensor_parallel_size": arguments.tp, "max_decode_gap": bound, "log_level": "warning"}
    with LLM(arguments.model, **settings) as llm:
        watch = _Watch(llm, arguments.streams)
        watch.until(lambda: min(map(len, watch.times.values())) >= ALONE_TOKENS)
        alone = [gap for times in watch.times.values() for gap in _between(times[IGNORED_TOKENS:])]
        undisturbed = statistics.median(alone)

        flooded = time.perf_counter()
        only_one = SamplingParams(temperature=0, max_tokens=1)
        # Any ids of a small vocabulary will do, as long as no two prompts begin alike.
        names = [f"prompt {number}" for number in range(arguments.prompts)]
        for name in names:
            llm.add_request([rng.randrange(3, 250) for _ in range(arguments.prompt_tokens)], only_one, name)
        watch.until(lambda: watch.finished.issuperset(names))
        gaps.flood_seconds.append(time.perf_counter() - flooded)
        gaps.alone += alone
        for times in watch.times.values():
            # The gap that the flood falls into counts in full.
            first = next(i for i, at in enumerate(times) if at > flooded) - 1
            gaps.multiples += [gap / undisturbed for gap in _between(times[first:])]


class _Watch:
    """Starts streams and notes when each of their tokens arrives."""

    def __init__(self, llm: LLM, num_streams: int) -> None:
        self.times: dict[str, list[float]] = {f"stream {number}": [] for number in range(num_streams)}
        self.finished: set[str] = set()
        self._llm = llm
        endless = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        for number, name in enumerate(self.times):
            llm.add_request([5 + number, 6, 7], endless, name)

    def until(self, done: Callable[[], bool]) -> None:
        """Receive tokens until `done()`."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not done():
            if time.monotonic() > deadline:
                raise DeadlineError(f"waited {DEADLINE_SECONDS:g} s in vain")
            outputs, now = self._llm.step(), time.perf_counter()
            for output in outputs:
                name = output.request_id
                if output.finished:
                    self.finished.add(name)
                if name in self.times:
                    if output.finished:
                        raise EngineError(f"{name} ended before the flood: fewer or shorter prompts are needed")
                    times = self.times[name]
                    # Tokens that arrive together do so at one time.
                    times += [now] * (len(output.outputs[0].token_ids) - len(times))


def _between(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def figures(bound: float, gaps: Gaps) -> dict[str, Any]:
    """One row of the table."""
    ordered = sorted(gaps.multiples)
    return {
        "max_decode_gap": bound,
        "undisturbed_ms": round(1e3 * statistics.median(gaps.alone), 2),
        "p50": round(percentile(ordered, 0.5), 2),
        "p90": round(percentile(ordered, 0.9), 2),
        "p99": round(percentile(ordered, 0.99), 2),
        "max": round(ordered[-1], 2),
        "gaps": len(ordered),
        "flood_s": round(statistics.median(gaps.flood_seconds), 2),
    }


def render(results: list[dict[str, Any]]) -> str:
    """The table: gaps under the flood in multiples of the undisturbed one."""
    header = ["max decode gap", "undisturbed ms", "p50", "p90", "p99", "max", "gaps", "flood over in s"]
    return table(header, [[f"{result['max_decode_gap']:g}", *list(result.values())[1:]] for result in results])
