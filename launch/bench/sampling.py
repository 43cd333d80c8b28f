"""Measures what sampling costs: a step's way from logits to tokens, and what it adds to a whole decode step.

One `ModelRunner` on this machine's CPU, no scheduler and no channel. The steps of all kinds take turns, so that
whatever else the machine does falls on each of them; figures are medians, of wall time and of the process's CPU time,
which says more on a busy machine (and with one thread: waiting threads spin). By default logits are invented (normal,
of bfloat16's precision, in which many tie); with `--model-step` a model of the shape of Qwen3-0.6B with random
weights computes them, and a step is timed as a whole.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import ConfigError
from launch.bench.figures import Spread, table
from launch.options import new_file, whole

WARM_UP = 2
"""Rounds that are not measured: rows are sent, memory is touched for the first time."""

QWEN3_0_6B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def add_parser(commands: Any) -> None:
    """Declare `sampling`."""
    parser = commands.add_parser("sampling", help=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=whole(1), default=64, help="rows of a step (default: %(default)s)")
    parser.add_argument("--vocab-size", type=whole(1), default=151_936, help="(default: %(default)s)")
    parser.add_argument("--steps", type=whole(1), default=15, help="steps measured of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=whole(1), help="of torch (default: its own choice)")
    parser.add_argument(
        "--model-step", action="store_true",
        help="time whole decode steps of Qwen3-0.6B's shape with random weights; takes about 3 GiB",
    )  # fmt: skip
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the figures to FILE, in milliseconds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print; medians, and the tenth to the ninetieth percentile."""
    from launch.bench.sampling_steps import HISTORY, set_num_threads

    if arguments.vocab_size < HISTORY:
        raise ConfigError(f"--vocab-size must be at least {HISTORY}, got {arguments.vocab_size}", "vocab_size")
    set_num_threads(arguments.threads)
    results = measure(arguments.batch, arguments.vocab_size, arguments.steps, arguments.model_step)
    print(render(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(
    num_rows: int, vocab_size: int, num_steps: int, model_step: bool, shape: dict[str, Any] = QWEN3_0_6B
) -> list[dict[str, Any]]:
    """One row of the table for each kind: `num_steps` steps of `num_rows` rows, in turns."""
    from launch.bench.sampling_steps import BLOCK_SIZE, KINDS, InventedLogits, RandomModel

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(shape | {"vocab_size": vocab_size}))
        settings: dict[str, Any] = {"device": "cpu", "block_size": BLOCK_SIZE, "max_num_seqs": num_rows}
        config = EngineConfig.create(model=directory, skip_tokenizer_init=True, **settings).resolve()
    runner = (RandomModel if model_step else InventedLogits)(config, num_rows, num_steps + WARM_UP)
    taken: list[list[tuple[float, float]]] = [[] for _ in KINDS]
    for turn in range(num_steps + WARM_UP):
        for number, times in enumerate(taken):
            times.append(runner.step(number))
        if sys.stderr.isatty():
            print(f"round {turn + 1} of {num_steps + WARM_UP} …", file=sys.stderr)
    walls, cpus = ([Spread.of((each[i] for each in times[WARM_UP:]), 1e3) for times in taken] for i in (0, 1))
    return [
        {
            "kind": kind.name,
            **dataclasses.asdict(wall),
            "cpu": cpu.median,
            "added_cpu": round(cpu.median - cpus[0].median, 1),
            "added_share": round(wall.median / walls[0].median - 1, 3) if model_step else None,
            "added_cpu_share": round(cpu.median / cpus[0].median - 1, 3) if model_step else None,
        }
        for kind, wall, cpu in zip(KINDS, walls, cpus, strict=True)
    ]


def render(results: list[dict[str, Any]]) -> str:
    """The table: milliseconds a step, wall as median (p10-p90), and what a kind adds to the greedy step."""
    header, rows = ["sampling", "wall ms", "CPU ms", "added CPU ms"], []
    for result in results:
        wall = f"{result['median']:.1f} ({result['p10']:.1f}-{result['p90']:.1f})"
        rows.append([result["kind"], wall, f"{result['cpu']:.1f}", f"{result['added_cpu']:+.1f}"])
        if result["added_share"] is not None:
            rows[-1] += [f"{result['added_share']:+.1%}", f"{result['added_cpu_share']:+.1%}"]
    return table([*header, "added wall", "added CPU"][: len(rows[0])], rows)
