"""Measures a step of the control plane without a model: scheduling, encoding, round trip and update.

The scheduler, its channel and its ranks' processes are the real ones; the ranks only invent tokens
(`invented_worker.py`). It knows no front end: what a `TokenDelta` costs on its way to one is not in the figures.

Rounds of steps alternate with rounds of a bare ZeroMQ ping of the same bytes to as many processes. A step is timed as
    schedule    `Scheduler.schedule`
    encode      `StepInput.pack`
    round trip  the rest of `Executor.submit`, and `Executor.collect`: sealing, ZeroMQ, the rank's unpacking,
                inventing and packing, and the reading of its answer
    update      `Scheduler.commit` and `Scheduler.take_deltas`
and its CPU time is `time.process_time` of the scheduler's process, ZeroMQ's threads included, over all four.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from configs.engine import EngineConfig
from launch.bench.bare_ping import BarePing
from launch.bench.figures import Spread, table
from launch.bench.invented_worker import VOCAB_SIZE, invented_output
from launch.options import new_file, whole
from nanoengine.channel import Channel, Direction, FrameWriter
from nanoengine.executor import Executor, MultiprocessExecutor
from nanoengine.messages import AddRequest
from nanoengine.run_dir import RunDir
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler import Scheduler, SchedulerLimits
from nanoengine.step import Epoch, StepInput, StepOutput

ENTRY = "launch.bench.invented_worker:run_worker"
BLOCK_SIZE = 16
ROUND = 50
"""Steps, then pings, in turns: whatever else the machine does falls on both."""
REST_SECONDS = 0.003
"""Before pings, so that the ranks have stopped spinning for their next step."""
LONG_CONTEXT = 8
"""The message is also sized at a context so many times as long."""


@dataclasses.dataclass
class StepTimes:
    """Seconds of each measured step, a list a stage."""

    schedule: list[float] = dataclasses.field(default_factory=list)
    encode: list[float] = dataclasses.field(default_factory=list)
    round_trip: list[float] = dataclasses.field(default_factory=list)
    update: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)
    ping: list[float] = dataclasses.field(default_factory=list)
    ping_cpu: list[float] = dataclasses.field(default_factory=list)
    num_bytes: list[int] = dataclasses.field(default_factory=list)


class _TimedStep(StepInput):
    """A step that notes how long it took to pack and what came out."""

    def pack(self) -> bytes:
        """See `StepInput.pack`."""
        began = time.perf_counter()
        payload = super().pack()
        self.pack_seconds = time.perf_counter() - began
        self.num_bytes = len(payload)
        return payload


def add_parser(commands: Any) -> None:
    """Declare `control-plane`."""
    parser = commands.add_parser("control-plane", help=__doc__.splitlines()[0])
    parser.add_argument(
        "--tp", type=whole(1, 64), nargs="+", default=[1, 2, 4], help="numbers of ranks (default: 1 2 4)"
    )
    parser.add_argument(
        "--sequences", type=whole(1), nargs="+", default=[1, 64, 256, 1024],
        help="numbers of decoding sequences (default: 1 64 256 1024)",
    )  # fmt: skip
    parser.add_argument("--steps", type=whole(1), default=500, help="steps measured for each (default: %(default)s)")
    parser.add_argument("--context", type=whole(1), default=512, help="tokens in each prompt (default: %(default)s)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the figures to FILE, in microseconds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print; medians, and the tenth to the ninetieth percentile."""
    results = []
    for tp in arguments.tp:
        with _machinery(tp) as (executor, epoch, ping):
            for num_seqs in arguments.sequences:
                _progress(f"tp {tp}, {num_seqs} sequences …")
                results.append(measure(executor, epoch, ping, tp, num_seqs, arguments.steps, arguments.context))
                # Step ids start at 1 with each scheduler, and so do an epoch's.
                epoch = Epoch(epoch.incarnation, epoch.group + 1)
                executor.stop()
                executor.start(epoch)
    print(render(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _machinery(tp: int) -> Iterator[tuple[Executor, Epoch, BarePing]]:
    """Ranks that invent, processes that answer pings, and a private directory for their sockets."""
    run_dir, epoch = RunDir.create(), Epoch(1, 1)
    executor = MultiprocessExecutor(EngineConfig.create(tensor_parallel_size=tp), run_dir.path, entry=ENTRY)
    try:
        with BarePing(tp, run_dir.path) as ping:
            executor.start(epoch)
            yield executor, epoch, ping
    finally:
        executor.stop()
        run_dir.remove()


def measure(
    executor: Executor, epoch: Epoch, ping: BarePing, tp: int, num_seqs: int, num_steps: int, context: int
) -> dict[str, Any]:
    """One row of the table: `num_steps` steady decode steps of `num_seqs` sequences, and as many pings."""
    scheduler = decoding_scheduler(num_seqs, context, epoch)
    warm_up = StepTimes()
    for _ in range(2 * BLOCK_SIZE):
        _step(scheduler, executor, warm_up)

    times, num_tokens = StepTimes(), 0
    while len(times.wall) < num_steps:
        for _ in range(min(ROUND, num_steps - len(times.wall))):
            num_tokens += _step(scheduler, executor, times)
        time.sleep(REST_SECONDS)
        num_bytes = frame_bytes(times.num_bytes[-1])
        output_bytes = frame_bytes(_output_bytes(scheduler))
        for _ in range(len(times.wall) - len(times.ping)):
            began, began_cpu = time.perf_counter(), time.process_time()
            ping.ping(num_bytes, output_bytes)
            times.ping.append(time.perf_counter() - began)
            times.ping_cpu.append(time.process_time() - began_cpu)

    long_context = decode_bytes(num_seqs, LONG_CONTEXT * context)
    figures = {
        name: dataclasses.asdict(Spread.of(getattr(times, name), 1e6))
        for name in ("schedule", "encode", "round_trip", "update", "wall", "cpu", "ping", "ping_cpu")
    }
    return {
        "tp": tp,
        "sequences": num_seqs,
        "steps": num_steps,
        "context": context,
        "tokens": num_tokens,
        **figures,
        "ratio": round(figures["round_trip"]["median"] / figures["ping"]["median"], 2),
        "input_bytes": frame_bytes(decode_bytes(num_seqs, context)),
        "input_bytes_long_context": frame_bytes(long_context),
        "output_bytes": output_bytes,
    }


def decoding_scheduler(num_seqs: int, context: int, epoch: Epoch) -> Scheduler:
    """A scheduler whose requests never end, of `context` tokens and a few: their blocks do not fill up together."""
    limits = SchedulerLimits(
        max_num_batched_tokens=num_seqs * (context + BLOCK_SIZE),  # all prompts in the first step
        max_num_seqs=num_seqs,
        max_model_len=2**20,
        num_kv_blocks=num_seqs * (context // BLOCK_SIZE + 1000),
        block_size=BLOCK_SIZE,
        vocab_size=VOCAB_SIZE,
    )
    scheduler = Scheduler(limits, epoch)
    params = SamplingParams(temperature=0, max_tokens=None).to_dict()
    for i in range(num_seqs):
        prompt = [(i * 7919 + position) % VOCAB_SIZE for position in range(context + i % BLOCK_SIZE)]
        scheduler.add(
            AddRequest(
                client_id="bench",
                request_id=str(i),
                prompt_token_ids=prompt,
                params=params,
                seed=i,
                arrival_time=0.0,
                priority=0,
                journal=[],
            )
        )
    return scheduler


def decode_bytes(num_seqs: int, context: int) -> int:
    """Size of the largest packed step of `num_seqs` decodes at that context, in steps enough for a block of each."""
    scheduler = decoding_scheduler(num_seqs, context, Epoch(1, 1))
    sizes: list[int] = []
    for _ in range(1 + BLOCK_SIZE):
        step = scheduler.schedule()
        assert step is not None
        if step.decodes:  # behind the prefill
            sizes.append(len(step.pack()))
        scheduler.commit(invented_output(step))
        scheduler.take_deltas()
    return max(sizes)


def frame_bytes(num_payload_bytes: int) -> int:
    """Size on the wire of a payload of that size."""
    return len(FrameWriter(bytes(32), Epoch(1, 1), Direction.TO_RANK, 0).seal(Channel.STEP, bytes(num_payload_bytes)))


def _output_bytes(scheduler: Scheduler) -> int:
    seq_ids = [seq.seq_id for seq in scheduler.running]
    return len(StepOutput(scheduler.epoch, 1000, seq_ids, [[VOCAB_SIZE - 1]] * len(seq_ids)).pack())


def _step(scheduler: Scheduler, executor: Executor, times: StepTimes) -> int:
    """Run one step, note its times, and return how many tokens came out."""
    began_cpu, began = time.process_time(), time.perf_counter()
    step = scheduler.schedule()
    scheduled = time.perf_counter()
    assert step is not None
    timed = _TimedStep(step.epoch, step.step_id, step.copies, step.states, step.finished, step.decodes)
    executor.submit(timed)
    output = executor.collect(None)
    collected = time.perf_counter()
    assert output is not None
    scheduler.commit(output)
    deltas = scheduler.take_deltas()
    ended, ended_cpu = time.perf_counter(), time.process_time()
    times.schedule.append(scheduled - began)
    times.encode.append(timed.pack_seconds)
    times.round_trip.append(collected - scheduled - timed.pack_seconds)
    times.update.append(ended - collected)
    times.wall.append(ended - began)
    times.cpu.append(ended_cpu - began_cpu)
    times.num_bytes.append(timed.num_bytes)
    return sum(len(item.delta.token_ids) for item in deltas)


def render(results: list[dict[str, Any]]) -> str:
    """The table, in microseconds: median (p10-p90)."""
    stages = ("schedule", "encode", "round_trip", "update", "wall", "cpu", "ping")
    header = ["tp", "seqs", *stages, "trip/ping", "bytes in", f"at {LONG_CONTEXT}x context", "bytes out"]
    rows = []
    for result in results:
        spreads = [Spread(**result[stage]) for stage in stages]
        sizes = [result["input_bytes"], result["input_bytes_long_context"], result["output_bytes"]]
        rows.append([result["tp"], result["sequences"], *spreads, f"{result['ratio']:.2f}", *sizes])
    return table(header, rows)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
