"""Where the time of a steady decode step goes: its kernels, and the idle time between steps; a process of its own.

    python -m tests.gpu.decode_profile --model DIR --out FILE [--streams 1 64] [--device cuda]

The kernels are those of a ModelRunner in this process under torch's profiler, with graphs and without; the step they
are compared with was timed without the profiler. The idle time is that of a whole engine (`step_clock.py`).
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from configs.engine import EngineConfig
from launch.bench.figures import table
from nanoengine import LLM, SamplingParams
from nanoengine.step import DecodeRows, Epoch, RowParams, SequenceState, StepInput
from tests.gpu.step_clock import StepClock, StepTimes, TimedRunner, timed
from workers.parallel import SingleCommunicator

_EPOCH = Epoch(0, 0)
_GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
_WARM_UP, _STEADY, _PROFILED = 8, 128, 16
_SHOWN = 16
_LONGEST_NAME = 90


class Decoding:
    """Streams of a runner that decode together, two steps under way at a time as in a rank's process."""

    def __init__(self, runner: TimedRunner, num_streams: int, context: int, each: int) -> None:
        """`each` stream has so many blocks."""
        self.runner, self._step_id, self._age = runner, 0, 0
        self._starts = array("i", [context] * num_streams)
        self._seq_ids = array("i", range(num_streams))
        for seq_id in range(num_streams):
            blocks = [*range(seq_id * each, (seq_id + 1) * each)]
            tokens = [(7 * at + 13 * seq_id) % 200 for at in range(context)]
            self._launch([SequenceState(seq_id, tokens, 0, blocks, True, context, _GREEDY)], DecodeRows()).finish()
        self._given = array("i", [5] * num_streams)  # the last step sampled for one stream alone

    def run(self, num_steps: int) -> None:
        """Decode so many tokens of each stream."""
        before = None
        for _ in range(num_steps):
            rows = DecodeRows(self._seq_ids, self._starts, self._age, self._given if not self._age else None)
            launched = self._launch([], rows)
            self._age += 1
            if before is not None:
                before.finish()
            before = launched
        if before is not None:
            before.finish()

    def _launch(self, states: list[SequenceState], decodes: DecodeRows) -> Any:
        self._step_id += 1
        return self.runner.launch(StepInput(_EPOCH, self._step_id, [], states, [], decodes))


def start_decoding(model: str, device: torch.device, num_streams: int, context: int, eager: bool) -> Decoding:
    """Streams of a runner that is warmed up, its graphs captured unless `eager`, with room for them and no more."""
    longest = context + _WARM_UP + _STEADY + _PROFILED + 1
    settings: dict[str, Any] = {"enforce_eager": eager, "max_num_seqs": num_streams, "max_model_len": longest}
    if device.type == "cpu":
        settings["attention_backend"] = "torch"
    config = EngineConfig.create(model=model, device=device.type, skip_tokenizer_init=True, **settings).resolve()
    runner = TimedRunner(config, device, SingleCommunicator())
    runner.load_model()
    each = -(-longest // config.cache.block_size)
    runner.allocate(num_streams * each)
    runner.warm_up()
    return Decoding(runner, num_streams, context, each)


def profile_decode(model: str, device: torch.device, num_streams: int, context: int, eager: bool) -> dict[str, Any]:
    """The kernels of a decode step, by time, and what the step takes without a profiler; seconds, of one step."""
    decoding = start_decoding(model, device, num_streams, context, eager)
    decoding.run(_WARM_UP)
    decoding.runner.times = times = StepTimes(StepClock(device))  # the first have seen compilations
    for times.holds in (False, True, False):  # so that both kinds of steps have the same context in the middle
        decoding.run(_STEADY // 4 * (1 + times.holds))
    step_times = times.summary()[str(num_streams)]
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as profiler:
        decoding.run(_PROFILED)
        if on_gpu:
            torch.cuda.synchronize(device)
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.key_averages():
        if (event.device_type == DeviceType.CPU) == on_gpu:
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found[event.key][0] += microseconds / 1e6 / _PROFILED
        found[event.key][1] += event.count / _PROFILED
    kernels = sorted(([name, *numbers] for name, numbers in found.items()), key=lambda each: -float(each[1]))
    return {"streams": num_streams, "context": context, "eager": eager, "times": step_times, "kernels": kernels}


def idle_in_processes(model: str, device: str, num_streams: int, context: int, num_tokens: int) -> dict[str, Any]:
    """Step times of a whole engine whose streams decode together; see `step_clock.py`."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=num_tokens)
    prompts = [[(7 * at + 13 * stream) % 200 for at in range(context)] for stream in range(num_streams)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.json"
        settings: dict[str, Any] = {"max_num_seqs": num_streams, "max_model_len": 2048} if device == "cuda" else {}
        with timed(file), LLM(model, skip_tokenizer_init=True, device=device, **settings) as llm:
            for _ in range(2):  # undisturbed, and held
                llm.generate(prompts, params, use_tqdm=False)
        times: dict[str, dict[str, float]] = json.loads(file.read_text(encoding="utf-8"))
    if str(num_streams) not in times:
        raise RuntimeError(f"no steady steps of {num_streams} rows were seen, only of {', '.join(times) or 'none'}")
    return {"streams": num_streams, "context": context + num_tokens // 2} | times[str(num_streams)]


def render(found: dict[str, Any], what: str) -> str:
    """The kernels as a Markdown table, after two lines on the step."""
    times, total = found["times"], sum(each[1] for each in found["kernels"])
    rows = [
        [_short(name), f"{count:.3g}", f"{1e6 * seconds:.1f}", f"{100 * seconds / total:.1f} %"]
        for name, seconds, count in found["kernels"][:_SHOWN]
    ]
    rest = found["kernels"][_SHOWN:]
    if rest:
        seconds, count = sum(each[1] for each in rest), sum(each[2] for each in rest)
        rows.append([f"{len(rest)} others", f"{count:.3g}", f"{1e6 * seconds:.1f}", f"{100 * seconds / total:.1f} %"])
    mode = "launch by launch" if found["eager"] else "as a graph"
    return (
        f"#### {what}, {found['streams']} streams of {found['context']} tokens, {mode}\n\n"
        f"A step takes {1e6 * times['step']:.0f} µs, the device {1e6 * times['busy']:.0f} µs of it, its kernels under "
        f"the profiler {1e6 * total:.0f} µs ({100 * total / times['step']:.0f} % of the step).\n\n"
        + table(["kernel", "a step", "µs a step", "of the kernels"], rows)
    )


def _short(name: str) -> str:
    name = name.replace("|", "¦").replace("\n", " ")
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 2] + " …"


def main() -> None:
    """Write `idle` and `profiles`, anew after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a checkpoint's directory")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--context", type=int, default=512, help="tokens of each (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="decoded for the idle time (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    result: dict[str, Any] = {"idle": [], "profiles": []}
    # The engines first: they want the memory that this process takes then.
    for streams in arguments.streams:
        found = idle_in_processes(arguments.model, arguments.device, streams, arguments.context, arguments.tokens)
        result["idle"].append(found)
        arguments.out.write_text(json.dumps(result), encoding="utf-8")
    for streams in arguments.streams:
        for eager in (False, True):
            result["profiles"].append(profile_decode(arguments.model, device, streams, arguments.context, eager))
            arguments.out.write_text(json.dumps(result), encoding="utf-8")
            gc.collect()  # a runner and its graphs are a cycle, and hold the device's memory
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
