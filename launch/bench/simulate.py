"""Replays traces through the real scheduler and block manager under a model of step time; starts no process.

It knows no model and no channel: a step takes as long as `StepTimeModel` says, its tokens are invented, and time is a
number that jumps from event to event. The same options and seed give the same figures. What one run shows is how
policy and memory move them; how fast a machine is, `StepTimeModel`'s constants claim and do not measure.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from configs.errors import ConfigError
from launch.bench.figures import percentile, table
from launch.bench.traces import TracedRequest, TraceSpec, generate
from launch.options import new_file, real, whole
from nanoengine.messages import AddRequest, TokenColumns
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler import Scheduler, SchedulerLimits
from nanoengine.step import DEVICE_TO_DEVICE, Epoch, StepInput, StepOutput, TokenLists

BLOCK_SIZE = 16
EPOCH = Epoch(1, 1)
_PARAMS = SamplingParams(temperature=0, ignore_eos=True).to_dict()


@dataclasses.dataclass(frozen=True)
class StepTimeModel:
    """Seconds of a step: base + tokens x per_token + decode rows x per_decode_row + attended x per_attended, and
    per_swapped_block for each block that is copied to the host or back before it.

    `attended` counts the cached tokens that the step's rows read: a decode its context, a prefill chunk the context
    before it once for each _CHUNK_QUERIES of its tokens (a kernel reads K/V once for a tile of queries).

    The defaults are an 8B Llama in bfloat16 on one H100, from its data sheet and not measured: 16 GB of weights
    at 3 TB/s (base), 16 GFLOP a token at 400 TFLOP/s (per_token), 128 KiB of K/V a token at 3 TB/s (per_attended),
    2 microseconds a row for sampling and the control plane, and 2 MiB a block at 50 GB/s of PCIe (per_swapped_block).
    """

    base: float = 5.3e-3
    per_token: float = 40e-6
    per_decode_row: float = 2e-6
    per_attended: float = 44e-9
    per_swapped_block: float = 42e-6

    def seconds(self, step: StepInput) -> float:
        """How long the step takes; a step that only drops rows takes no time."""
        copying = 0.0
        if step.copies:
            copying = self.per_swapped_block * sum(copy[0] != DEVICE_TO_DEVICE for copy in step.copies)
        if not step.num_rows:
            return copying
        decodes = step.decodes
        num_tokens = num_decodes = len(decodes)
        attended = sum(decodes.starts) + decodes.age * num_decodes
        for row in step.states:
            count = len(row.token_ids)
            num_tokens += count
            if count == 1:
                num_decodes += 1
                attended += row.num_computed_tokens
            else:
                attended += row.num_computed_tokens * -(-count // _CHUNK_QUERIES)
        computing = self.per_token * num_tokens + self.per_decode_row * num_decodes + self.per_attended * attended
        return self.base + computing + copying


_CHUNK_QUERIES = 64


class Simulation:
    """One trace through one scheduler; `run` plays it, the other methods are its steps."""

    def __init__(self, limits: SchedulerLimits, model: StepTimeModel) -> None:
        self.scheduler, self.model = Scheduler(limits, EPOCH), model
        self.clock = self.busy = 0.0
        self.num_steps = self.num_refused = self.num_finished = self.num_output_tokens = 0
        self.ttft, self.tpot = array("d"), array("d")  # seconds, of every request that finished
        self.urgent_ttft = array("d")  # of those that were urgent
        self._urgent: set[str] = set()
        self.num_prefill_tokens = 0
        self._arrival: dict[str, float] = {}
        self._first: dict[str, float] = {}
        self._last: dict[str, float] = {}  # when a request's latest token came
        self.gaps = array("f")  # seconds between two tokens of a request

    def run(self, trace: Iterator[TracedRequest]) -> None:
        """Play the whole trace to its end."""
        upcoming = next(trace, None)
        while True:
            while upcoming is not None and upcoming.arrival <= self.clock:
                self._add(upcoming)
                upcoming = next(trace, None)
            step = self.scheduler.schedule()
            if step is not None:
                self._compute(step)
            elif upcoming is not None:
                self.clock = upcoming.arrival
            else:
                break
        assert not self.scheduler.has_work, "the scheduler stands still with requests left"

    def _add(self, request: TracedRequest) -> None:
        name = str(request.number)
        self._arrival[name] = request.arrival
        self.scheduler.add(
            AddRequest(
                client_id="",
                request_id=name,
                prompt_token_ids=request.prompt_token_ids,
                params=_PARAMS | {"max_tokens": request.num_output_tokens},
                seed=request.number,
                arrival_time=request.arrival,
                priority=request.priority,
                journal=[],
            )
        )
        if request.priority < 0:
            self._urgent.add(name)
        self._deliver()  # a refusal comes at once

    def _compute(self, step: StepInput) -> None:
        seconds = self.model.seconds(step)
        self.clock += seconds
        self.busy += seconds
        self.num_steps += bool(step.num_rows)
        # A token 1 for each row that samples, as the columns that workers send.
        counts = array("i", [1]) * len(step.decodes) + array("i", [row.sample for row in step.states])
        tokens = TokenLists(array("i", [1]) * sum(counts), counts if 0 in counts else None)
        self.scheduler.commit(StepOutput(step.epoch, step.step_id, [], tokens, seconds))
        self._deliver()

    def _deliver(self) -> None:
        """Take note of what the clients would have been told."""
        now = self.clock
        for _, delta in self.scheduler.take_deltas().entries:
            self.num_output_tokens += len(delta.token_ids)
            if isinstance(delta, TokenColumns):  # sequences that neither begin nor end
                self.gaps.extend([now - self._last[request_id] for request_id in delta.request_ids])
                self._last.update(dict.fromkeys(delta.request_ids, now))
                continue
            if delta.token_ids:
                if delta.start == 0:
                    self._first[delta.request_id] = now
                else:
                    self.gaps.append(now - self._last[delta.request_id])
                self._last[delta.request_id] = now
            if delta.finish_reason is not None:
                self._end(delta.request_id, delta.start + len(delta.token_ids), delta.finish_reason)

    def _end(self, name: str, num_tokens: int, finish_reason: str) -> None:
        arrival, first = self._arrival.pop(name), self._first.pop(name, None)
        self._last.pop(name, None)
        is_urgent = name in self._urgent
        self._urgent.discard(name)
        if finish_reason == "error" or first is None:
            self.num_refused += 1
            return
        self.num_finished += 1
        self.ttft.append(first - arrival)
        if is_urgent:
            self.urgent_ttft.append(first - arrival)
        if num_tokens > 1:
            self.tpot.append((self.clock - first) / (num_tokens - 1))

    def figures(self) -> dict[str, Any]:
        """What came of it; times in the trace's seconds."""
        ttft, tpot, blocks = sorted(self.ttft), sorted(self.tpot), self.scheduler.blocks
        urgent = sorted(self.urgent_ttft)
        gaps = self.gaps  # one for each token of the trace, so they are sorted where they lie
        if gaps:
            np.frombuffer(gaps, dtype=np.float32).sort()
        return {
            "seconds": round(self.clock, 3),
            "finished": self.num_finished,
            "refused": self.num_refused,
            "output_tokens": self.num_output_tokens,
            "output_tokens_per_s": round(self.num_output_tokens / self.clock, 1) if self.clock else 0.0,
            "busy_share": round(self.busy / self.clock, 3) if self.clock else 0.0,
            "steps": self.num_steps,
            **{f"ttft_p{q}_ms": round(1e3 * percentile(ttft, q / 100), 1) for q in (50, 90, 99)},
            **{f"urgent_ttft_p{q}_ms": round(1e3 * percentile(urgent, q / 100), 1) for q in (50, 90, 99) if urgent},
            **{f"tpot_p{q}_ms": round(1e3 * percentile(tpot, q / 100), 2) for q in (50, 90, 99)},
            "gap_p99_ms": round(1e3 * percentile(gaps, 0.99), 2),
            "gap_max_ms": round(1e3 * percentile(gaps, 1), 2),
            "preemptions": self.scheduler.num_preemptions,
            "swaps": self.scheduler.num_swaps,
            "blocks_swapped_out": blocks.num_blocks_swapped_out,
            "blocks_swapped_in": blocks.num_blocks_swapped_in,
            "hit_rate": _share(blocks.num_hit_tokens, blocks.num_query_tokens),
            "host_hit_rate": _share(blocks.num_host_hit_tokens, blocks.num_query_tokens),
        }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def add_parser(commands: Any) -> None:
    """Declare `simulate`."""
    parser = commands.add_parser("simulate", help=__doc__.splitlines()[0])
    spec, model = TraceSpec(), StepTimeModel()
    parser.add_argument("--requests", type=whole(1), default=spec.num_requests, help="default: %(default)s")
    parser.add_argument(
        "--rate", type=real(above=0), default=spec.rate, help="requests a second (default: %(default)s)"
    )
    parser.add_argument("--arrivals", choices=("poisson", "bursty"), default=spec.arrivals)
    parser.add_argument(
        "--prefix-share", type=real(0, 1), default=spec.prefix_share,
        help="share of requests that start with one of the system prompts (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--urgent-share", type=real(0, 1), default=spec.urgent_share,
        help="share of requests of priority -1, the others have 0 (default: %(default)s)",
    )  # fmt: skip
    for name in ("prompt_median", "output_median", "max_prompt", "max_output", "num_prefixes", "prefix_length"):
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=whole(1), default=getattr(spec, name), help="tokens (default: %(default)s)")
    parser.add_argument(
        "--num-kv-blocks", type=whole(1), nargs="+", default=[24_000], help="one run each (default: 24000)"
    )
    parser.add_argument("--max-num-batched-tokens", type=whole(1), nargs="+", default=[2048], help="(default: 2048)")
    parser.add_argument("--max-num-seqs", type=whole(1), nargs="+", default=[256], help="one run each (default: 256)")
    parser.add_argument("--policy", choices=("fcfs", "priority"), nargs="+", default=["fcfs"])
    parser.add_argument(
        "--max-decode-gap", type=real(0), nargs="+", default=[0.0], help="0 = off; one run each (default: 0)"
    )
    parser.add_argument(
        "--num-host-blocks", type=whole(0), nargs="+", default=[0], help="of the swap space; one run each (default: 0)"
    )
    parser.add_argument("--preemption-mode", choices=("recompute", "swap"), nargs="+", default=["recompute"])
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--seed", type=whole(0), default=spec.seed)
    for field in dataclasses.fields(model):
        flag = "--step-" + field.name.replace("_", "-")
        parser.add_argument(flag, type=real(0), default=field.default, help="seconds (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the figures to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Replay the trace once for each combination of settings, and print a table."""
    names = [field.name for field in dataclasses.fields(TraceSpec) if hasattr(arguments, field.name)]
    spec = TraceSpec(num_requests=arguments.requests, **{name: getattr(arguments, name) for name in names})
    if "swap" in arguments.preemption_mode and not all(arguments.num_host_blocks):
        raise ConfigError("--preemption-mode swap needs --num-host-blocks greater than 0", "num_host_blocks")
    model = StepTimeModel(*(getattr(arguments, f"step_{f.name}") for f in dataclasses.fields(StepTimeModel)))
    results = []
    for num_blocks, budget, num_seqs, policy, gap, num_host_blocks, preemption_mode in itertools.product(
        arguments.num_kv_blocks,
        arguments.max_num_batched_tokens,
        arguments.max_num_seqs,
        arguments.policy,
        arguments.max_decode_gap,
        arguments.num_host_blocks,
        arguments.preemption_mode,
    ):
        limits = SchedulerLimits(
            max_num_batched_tokens=budget,
            max_num_seqs=num_seqs,
            max_model_len=spec.max_prompt + spec.prefix_length + spec.max_output + 1,
            num_kv_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_host_blocks=num_host_blocks,
            preemption_mode=preemption_mode,
            enable_prefix_caching=not arguments.no_prefix_caching,
            policy=policy,
            max_decode_gap=gap,
        )
        results.append(simulate(spec, limits, model))
        if sys.stderr.isatty():
            print(f"{num_blocks} blocks: {results[-1]['replay_s']} s", file=sys.stderr)
    print(render(results))
    if arguments.json is not None:
        report = {"trace": dataclasses.asdict(spec), "model": dataclasses.asdict(model), "runs": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def simulate(spec: TraceSpec, limits: SchedulerLimits, model: StepTimeModel) -> dict[str, Any]:
    """One row of the table: settings, figures, and the CPU time of the replay itself (`replay_s`)."""
    simulation = Simulation(limits, model)
    began = time.process_time()
    simulation.run(generate(spec))
    return {
        "num_kv_blocks": limits.num_kv_blocks,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "max_num_seqs": limits.max_num_seqs,
        "policy": limits.policy,
        "max_decode_gap": limits.max_decode_gap,
        "num_host_blocks": limits.num_host_blocks,
        "preemption_mode": limits.preemption_mode,
        **simulation.figures(),
        "replay_s": round(time.process_time() - began, 2),
    }


_SETTINGS = {
    "num_kv_blocks": "K/V blocks",
    "num_host_blocks": "host blocks",
    "preemption_mode": "preemption",
    "max_num_batched_tokens": "budget",
    "max_num_seqs": "seqs",
    "policy": "policy",
    "max_decode_gap": "gap",
}


def render(results: list[dict[str, Any]]) -> str:
    """The table: settings that differ, times in milliseconds as p50/p90/p99, gaps between tokens as p99/largest."""
    shown = [name for name in _SETTINGS if name == "num_kv_blocks" or len({result[name] for result in results}) > 1]
    urgent = ["urgent"] if any("urgent_ttft_p50_ms" in result for result in results) else []
    header = [
        *(_SETTINGS[name] for name in shown), "tokens/s", "busy", "TTFT ms", *urgent, "TPOT ms", "gap ms", "preempted",
        "blocks out/in", "hits (host)", "refused", "replay CPU s",
    ]  # fmt: skip
    rows = []
    for result in results:
        ttft = ["/".join(f"{result[f'ttft_p{q}_ms']:.0f}" for q in (50, 90, 99))]
        if urgent:
            ttft.append("/".join(f"{result.get(f'urgent_ttft_p{q}_ms', 0):.0f}" for q in (50, 90, 99)))
        tpot = "/".join(f"{result[f'tpot_p{q}_ms']:.1f}" for q in (50, 90, 99))
        gap = f"{result['gap_p99_ms']:.1f}/{result['gap_max_ms']:.1f}"
        speed = [f"{result['output_tokens_per_s']:.0f}", f"{result['busy_share']:.0%}"]
        moved = f"{result['blocks_swapped_out']}/{result['blocks_swapped_in']}"
        hits = f"{result['hit_rate']:.1%} ({result['host_hit_rate']:.1%})"
        rest = [result["preemptions"], moved, hits, result["refused"], f"{result['replay_s']:.1f}"]
        rows.append([*(result[name] for name in shown), *speed, *ttft, tpot, gap, *rest])
    return table(header, rows)
