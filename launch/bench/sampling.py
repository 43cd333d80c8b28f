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
import time
from pathlib import Path
from typing import Any

import torch

from configs.engine import EngineConfig
from launch.bench.figures import Spread, table
from nanoengine.step import Epoch, RowExtras, RowParams, SequenceState, StepInput, StepOutput
from workers.attention import get_backend
from workers.input_batch import Batch
from workers.model_runner import ModelRunner
from workers.models.decoder import DecoderSpec
from workers.models.registry import get_model_class
from workers.parallel import SingleCommunicator

BLOCK_SIZE, CONTEXT = 16, 64
WARM_UP = 2
"""Rounds that are not measured: rows are sent, memory is touched for the first time."""
HISTORY = 1000
"""Distinct tokens that each row's penalties look at, half of them in its prompt."""

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

_PENALTIES = RowExtras(presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.1)
_EPOCH = Epoch(1, 1)


@dataclasses.dataclass(frozen=True)
class Kind:
    """What every row of a step asks for."""

    name: str
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    extras: RowExtras | None = None


KINDS = (
    Kind("greedy", temperature=0.0),
    Kind("temperature"),
    Kind("top-k 50", top_k=50),
    Kind("top-p 0.9", top_p=0.9),
    Kind("top-k + top-p", top_k=50, top_p=0.9),
    Kind("top-k + top-p + min-p", top_k=50, top_p=0.9, min_p=0.05),
    Kind("penalties", temperature=0.0, extras=_PENALTIES),
    Kind("top-k + top-p + penalties", top_k=50, top_p=0.9, extras=_PENALTIES),
    Kind("logprobs 5", temperature=0.0, extras=RowExtras(num_logprobs=5)),
)


class _Runner(ModelRunner):
    """A runner of `num_rows` sequences of every kind, each with `CONTEXT` tokens in the cache."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, torch.device("cpu"), SingleCommunicator())
        self.num_rows = num_rows
        self.blocks_per_row = -(-(CONTEXT + num_steps) // BLOCK_SIZE)
        self._step_ids, self._lengths = 0, [CONTEXT] * len(KINDS)

    def prepare(self) -> None:
        """Whatever a step needs before its time is taken."""

    def step(self, number: int) -> tuple[float, float]:
        """One decode step of the rows of KINDS[number]; returns its seconds and its CPU seconds."""
        length = self._lengths[number]
        rows = [self._row(number, row, length) for row in range(self.num_rows)]
        self._lengths[number] += 1
        self._step_ids += 1
        step = StepInput(_EPOCH, self._step_ids, [], rows, [])
        self.prepare()
        began, began_cpu = time.perf_counter(), time.process_time()
        output = self.execute(step)
        seconds = time.perf_counter() - began, time.process_time() - began_cpu
        assert isinstance(output, StepOutput)
        assert all(len(ids) == 1 for ids in output.token_ids)
        return seconds

    def _row(self, number: int, row: int, length: int) -> SequenceState:
        seq_id = number * self.num_rows + row
        if length > CONTEXT:
            return SequenceState(seq_id, [1], length, [], True)
        kind, vocab_size = KINDS[number], self._config.resolved_checkpoint.vocab_size
        params = RowParams(kind.temperature, kind.top_k, kind.top_p, kind.min_p, row, 0)
        # All kinds write into the same blocks: what they hold makes no difference to the time that a step takes.
        blocks = [row * self.blocks_per_row + i for i in range(self.blocks_per_row)]
        past = [(row * 7919 + 31 * i) % vocab_size for i in range(HISTORY)]
        return SequenceState(seq_id, [1], CONTEXT, blocks, True, HISTORY // 2, params, kind.extras, past)


class InventedLogits(_Runner):
    """Gives every step the same logits in place of a model's."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, num_rows, num_steps)
        shape = num_rows, config.resolved_checkpoint.vocab_size
        self._invented = 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._invented = self._invented.bfloat16().float()
        self._logits = torch.empty_like(self._invented)
        self._batch = self._make_batch(num_rows * self.blocks_per_row)

    def prepare(self) -> None:
        """Undo what processors did to the logits."""
        self._logits.copy_(self._invented)

    def compute_logits(self, step: StepInput) -> tuple[Batch | None, torch.Tensor | None]:
        """See `ModelRunner.compute_logits`."""
        assert self._batch is not None
        return self._batch.apply(step), self._logits


class RandomModel(_Runner):
    """Computes with random weights, made in memory."""

    def __init__(self, config: EngineConfig, num_rows: int, num_steps: int) -> None:
        super().__init__(config, num_rows, num_steps)
        self.load_model()
        self.allocate(num_rows * self.blocks_per_row)

    def load_model(self) -> None:
        """Uniform weights, scaled by fan-in; norms are 1."""
        checkpoint = self._config.resolved_checkpoint
        spec = DecoderSpec(
            config=checkpoint,
            communicator=self._communicator,
            backend=get_backend(self._config.model.attention_backend, self._device),
            dtype=self._dtype,
            device=self._device,
            max_positions=self._config.max_model_len,
        )
        model = get_model_class(checkpoint.architecture)(spec)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1)
            else:
                bound = (3 / parameter.shape[1]) ** 0.5
                parameter.data.uniform_(-bound, bound, generator=generator)
        model.finish_loading()
        self._model = model.eval()


def add_parser(commands: Any) -> None:
    """Declare `sampling`."""
    parser = commands.add_parser("sampling", help=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64, help="rows of a step (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=15, help="steps measured of each kind (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument(
        "--model-step", action="store_true",
        help="time whole decode steps of Qwen3-0.6B's shape with random weights; takes about 3 GiB",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE, in milliseconds")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Measure and print; medians, and the tenth to the ninetieth percentile."""
    if min(arguments.batch, arguments.steps, arguments.threads) < 1 or arguments.vocab_size < HISTORY:
        raise SystemExit(f"--batch, --steps and --threads must be at least 1, --vocab-size at least {HISTORY}")
    torch.set_num_threads(arguments.threads)
    results = measure(arguments.batch, arguments.vocab_size, arguments.steps, arguments.model_step)
    print(render(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measure(
    num_rows: int, vocab_size: int, num_steps: int, model_step: bool, shape: dict[str, Any] = QWEN3_0_6B
) -> list[dict[str, Any]]:
    """One row of the table for each kind: `num_steps` steps of `num_rows` rows, in turns."""
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
