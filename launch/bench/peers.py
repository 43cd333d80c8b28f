"""Compares this engine with others that are installed, on the same work: each in turn, and all of them again.

A peer is a Python environment with the engine in it, and a script that does the work of `peer_workloads.py` on it and
writes a JSON file. Each turn starts it afresh, so that whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import ConfigError
from launch.bench.figures import table
from launch.bench.hardware import hardware, hardware_line
from launch.bench.peer_workloads import make
from launch.bench.processes import proportional_memory, tree
from launch.bench.throughput import engine_settings
from nanoengine.processes import num_cores

# The figure of a workload: its name in the result files, its unit, and whether more of it is better.
_FIGURES = {"W1": ("out_tok_s", "tokens/s out", True), "W3": ("prompt_tok_s", "tokens/s in", True)}
_PER_STEP, _IN_ALL = ("ms_per_step", "ms a step", False), ("wall_s", "s in all", False)
_OWN = "nanoengine"
_SAMPLE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Peer:
    """How an engine is run.

    Attributes:
        name: of its column.
        command: what runs the workloads; `--workloads NAMES --reps N --out FILE` is added.
        env: added to the environment.
    """

    name: str
    command: list[str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)


def add_parser(commands: Any) -> None:
    """Declare `peers`; whatever follows `--` goes to this engine."""
    parser = commands.add_parser("peers", help=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="a name or a checkpoint's directory (default: %(default)s)")
    parser.add_argument(
        "--openvino-model", type=Path, metavar="DIR", help="the same exported for OpenVINO, which is left out without"
    )
    for name, words in (("scripts", "run_vllm.py, run_ov.py and run_hf.py"), ("venvs", "vllm, ovgenai and base")):
        variable = f"NANOENGINE_PEER_{name.upper()}"
        parser.add_argument(
            f"--peer-{name}", type=Path, metavar="DIR", default=os.environ.get(variable),
            help=f"the folder with {words}; a peer without is left out (default: ${variable})",
        )  # fmt: skip
    parser.add_argument("--engines", metavar="NAMES", help="only these columns, separated by commas (default: all)")
    parser.add_argument("--workloads", default="W1,W2,W3,W4,S1,S32", help="(default: %(default)s)")
    parser.add_argument("--reps", type=int, default=2, help="repetitions in each turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="starts of each engine (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="ranks, of engines that can (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for a turn (default: %(default)s)")
    parser.add_argument(
        "--memory", action="store_true", help="also the peak of the processes' PSS; looking at it disturbs a little"
    )
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="also write every run to FILE as JSON")
    parser.add_argument("engine", nargs="*", metavar="-- ENGINE OPTIONS", help="options of `python -m launch`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run all turns and print the table; 1 when an engine failed, which its column then tells.

    Raises:
        ConfigError: a value outside its range, or an engine that is not known or not installed.
    """
    names = arguments.workloads.split(",")
    for name in names:
        make(name, 1000, 0)
    if min(arguments.reps, arguments.turns, arguments.tp) < 1:
        raise ConfigError("--reps, --turns and --tp must be at least 1", "reps")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {arguments.output.parent}", "output")
    peers = find_peers(arguments)
    machine = hardware()
    print(hardware_line(), f"columns: {', '.join(peer.name for peer in peers)}", sep="\n", flush=True)
    turns: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in peers}
    for number in range(arguments.turns):
        for peer in peers:
            turn = run_turn(peer, arguments)
            turns[peer.name].append(turn)
            told = turn.get("error") or f"ready after {turn['load_s']:.1f} s"
            print(f"turn {number + 1} of {peer.name}: {told}", file=sys.stderr, flush=True)
    print(render(names, turns))
    if arguments.output is not None:
        report = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "engine_options": arguments.engine,
            "tp": arguments.tp,
            "turns": turns,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return int(any("error" in turn for each in turns.values() for turn in each))


def find_peers(arguments: argparse.Namespace) -> list[Peer]:
    """This engine, and those that are installed (or those of them that `--engines` names). Raises ConfigError."""
    tp, cores = arguments.tp, num_cores()
    settings = engine_settings(["--max-model-len", "4096", "--max-num-seqs", "64", *arguments.engine])
    settings |= {"model": arguments.model, "tensor_parallel_size": tp, "skip_tokenizer_init": True}
    config = EngineConfig.create(**settings).resolve()
    model, vocab_size = str(config.model_dir), str(config.resolved_checkpoint.vocab_size)
    own = ["-m", "launch.bench.peer_workloads", "--settings", json.dumps(settings), "--vocab-size", vocab_size]
    found = [Peer(_OWN, [sys.executable, *own])]
    share = max(1, cores // tp)
    places = "|".join(f"{rank * share}-{(rank + 1) * share - 1}" for rank in range(tp))
    vllm_env = {"VLLM_CPU_OMP_THREADS_BIND": places, "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
    known = [
        ("vllm", "vllm", ["run_vllm.py", "--model", model, "--tp", str(tp)], vllm_env | {"VLLM_NO_USAGE_STATS": "1"}),
        ("openvino", "ovgenai", ["run_ov.py", "--threads", str(cores), "--model", str(arguments.openvino_model)], {}),
        ("transformers", "base", ["run_hf.py", "--mode", "static", "--threads", str(cores), "--model", model], {}),
    ]
    for name, venv, (script, *rest), env in known:
        if arguments.peer_scripts is None or arguments.peer_venvs is None:
            continue
        python, file = Path(arguments.peer_venvs) / venv / "bin" / "python", Path(arguments.peer_scripts) / script
        if python.exists() and file.is_file() and (name != "openvino" or arguments.openvino_model is not None):
            found.append(Peer(name, [str(python), str(file), *rest], env))
    wanted = [peer.name for peer in found] if arguments.engines is None else arguments.engines.split(",")
    missing = [name for name in wanted if name not in {peer.name for peer in found}]
    if missing:
        raise ConfigError(
            f"--engines: {', '.join(missing)} cannot be run; {', '.join(p.name for p in found)} can", "engines"
        )
    return [peer for peer in found if peer.name in wanted]


def run_turn(peer: Peer, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start an engine, let it do all the work, and end it: `load_s`, `runs`, `error` and, if asked for, `peak_pss`."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.json", Path(folder) / "log"
        command = [*peer.command, "--workloads", arguments.workloads, "--reps", str(arguments.reps), "--out", str(out)]
        code, peak = run_process(command, log, arguments.timeout, peer.env, arguments.memory)
        if code or not out.is_file():
            return {"error": f"exit code {code}: {last_line(log)}"}
        result: dict[str, Any] = json.loads(out.read_text())
    turn: dict[str, Any] = {"load_s": result["load_s"], "runs": result["runs"]}
    errors = [each["error"] for runs in turn["runs"].values() for each in runs if "error" in each]
    return turn | ({"error": errors[0]} if errors else {}) | ({"peak_pss": peak} if arguments.memory else {})


def run_process(
    command: list[str], log: Path, seconds: float, env: dict[str, str] | None = None, measures: bool = False
) -> tuple[int, int]:
    """Run a program in a session of its own, all of which is killed when it ends or its time is up.

    Args:
        log: a file for what it says.
        env: added to the environment.
        measures: look at its processes' memory meanwhile.

    Returns:
        Its exit code, and the peak of its processes' PSS in bytes if that is measured.
    """
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=os.environ | (env or {}),
            start_new_session=True,
        )  # fmt: skip
    try:
        peak = _wait(process, seconds, measures)
    finally:
        # The engine's own children too, which it left behind if it failed.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return code, peak


def last_line(log: Path) -> str:
    """The last thing that a program said."""
    text = log.read_text(errors="replace").strip()
    return text.splitlines()[-1] if text else "and said nothing"


def _wait(process: subprocess.Popen[bytes], seconds: float, measures: bool) -> int:
    """Until it ends, or is ended at its deadline; the peak of its processes' PSS in bytes if that is measured."""
    deadline, peak = time.monotonic() + seconds, 0
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
            break
        if measures:
            peak = max(peak, proportional_memory(tree(process.pid)))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SAMPLE_SECONDS)
    return peak


def render(names: list[str], turns: dict[str, list[dict[str, Any]]]) -> str:
    """Medians (least to largest) over all repetitions, and by what factor this engine is the better one."""
    rows = []
    for name in names:
        key, unit, more = _FIGURES.get(name, _PER_STEP if name == "W2" or name.startswith("S") else _IN_ALL)
        values = {engine: _values(each, name, key) for engine, each in turns.items()}
        rows.append([f"{name}, {unit}", *_cells(values, more)])
    rows.append(["start to ready, s", *_cells({name: _of(each, "load_s", 1) for name, each in turns.items()}, False)])
    if any("peak_pss" in turn for each in turns.values() for turn in each):
        sizes = {name: _of(each, "peak_pss", 2**-30) for name, each in turns.items()}
        rows.append(["peak memory, GiB", *_cells(sizes, False)])
    return table(["", *turns], rows)


def _values(turns: list[dict[str, Any]], name: str, key: str) -> list[float]:
    runs = [each for turn in turns for each in turn.get("runs", {}).get(name, ())]
    return [each[key] for each in runs if key in each]


def _of(turns: list[dict[str, Any]], key: str, scale: float) -> list[float]:
    return [turn[key] * scale for turn in turns if key in turn]


def _cells(values: dict[str, list[float]], more: bool) -> list[str]:
    own = statistics.median(values[_OWN]) if values.get(_OWN) else None
    cells = []
    for name, each in values.items():
        if not each:
            cells.append("failed")
            continue
        median = statistics.median(each)
        cell = f"{_short(median)} ({_short(min(each))}-{_short(max(each))})"
        if own is not None and name != _OWN:
            cell += f", x{own / median if more else median / own:.2f}"
        cells.append(cell)
    return cells


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
