"""Answers a batch of requests through `LLM`, in real processes and without HTTP, and measures how fast.

By default it is the benchmark that nano-vllm made common (its bench.py): 256 requests of 100 to 1,024 random token ids
in and 100 to 1,024 out, temperature 0.6, no end of sequence; 142,827 tokens in and 133,966 out in all. The tokens that
come out are counted in what came out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from configs.engine import LAYERS, EngineConfig, setting_owners
from configs.errors import ConfigError, EngineError
from launch.bench.hardware import hardware, hardware_line
from launch.options import real
from nanoengine.sampling_params import SamplingParams

MAX_TOKEN_ID = 10_000
_WARM_UP = 16


@dataclasses.dataclass(frozen=True)
class Workload:
    """Requests by their lengths, each drawn between two bounds, both included.

    Raises:
        ConfigError: a value outside its range.
    """

    num_requests: int = 256
    input_len: tuple[int, int] = (100, 1024)
    output_len: tuple[int, int] = (100, 1024)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_requests < 1:
            raise ConfigError(f"--num-requests must be at least 1, got {self.num_requests}", "num_requests")
        for name in ("input_len", "output_len"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ConfigError(f"--{name.replace('_', '-')} must be 1 <= MIN <= MAX, got {low} {high}", name)

    def draw(self) -> tuple[list[list[int]], list[int]]:
        """Prompts and output lengths, drawn in nano-vllm's order: each prompt's length and ids, then all outputs."""
        rng = random.Random(self.seed)
        prompts = []
        for _ in range(self.num_requests):
            length = rng.randint(*self.input_len)
            prompts.append([rng.randint(0, MAX_TOKEN_ID) for _ in range(length)])
        return prompts, [rng.randint(*self.output_len) for _ in range(self.num_requests)]


def add_parser(commands: Any) -> None:
    """Declare `throughput`; whatever follows `--` goes to the engine."""
    parser = commands.add_parser("throughput", help=__doc__.splitlines()[0])
    usual = Workload()
    parser.add_argument("--num-requests", type=int, default=usual.num_requests, help="default: %(default)s")
    for name, words in (("input_len", "tokens of a prompt"), ("output_len", "tokens of an answer")):
        parser.add_argument(
            "--" + name.replace("_", "-"), type=int, nargs=2, metavar=("MIN", "MAX"), default=getattr(usual, name),
            help=f"{words} (default: 100 1024)",
        )  # fmt: skip
    parser.add_argument("--seed", type=int, default=usual.seed, help="of lengths and ids (default: %(default)s)")
    parser.add_argument("--temperature", type=real(0), default=0.6, help="default: %(default)s")
    parser.add_argument("--runs", type=int, default=1, help="measured runs on one engine (default: %(default)s)")
    parser.add_argument("--output", "--json", type=Path, metavar="FILE", help="also write the figures to FILE as JSON")
    parser.add_argument("engine", nargs="*", metavar="-- ENGINE OPTIONS", help="options of `python -m launch`")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Measure and print; returns 0.

    Raises:
        ConfigError: the requests do not fit the model, or a setting cannot be.
        NanoEngineError: what keeps the engine from starting or answering.
    """
    lengths = (tuple(arguments.input_len), tuple(arguments.output_len))
    workload = Workload(arguments.num_requests, *lengths, seed=arguments.seed)
    if arguments.runs < 1:
        raise ConfigError(f"--runs must be at least 1, got {arguments.runs}", "runs")
    if arguments.output is not None and not arguments.output.parent.is_dir():
        raise ConfigError(f"--output: there is no folder {arguments.output.parent}", "output")
    settings = engine_settings(arguments.engine)
    config = EngineConfig.create(**settings).resolve()
    prompts, output_lens = workload.draw()
    notes = [*_fit(prompts, output_lens, config)]
    machine = hardware()
    print(hardware_line(), *notes, sep="\n", flush=True)
    runs = measure(settings, prompts, output_lens, arguments.temperature, arguments.runs)
    for figures in runs:
        print(render(figures), flush=True)
    if len(runs) > 1:
        print(f"median: {statistics.median(each['output_tokens_per_s'] for each in runs):.1f} output tokens/s")
    if arguments.output is not None:
        report = {
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "workload": dataclasses.asdict(workload) | {"temperature": arguments.temperature},
            "engine_options": arguments.engine,
            "notes": notes,
            "runs": runs,
        }
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


def engine_settings(options: list[str]) -> dict[str, Any]:
    """Options of `python -m launch` as keyword arguments of `LLM`. Raises ConfigError."""
    from launch.cli import parse

    config = parse(options)
    return {name: getattr(getattr(config, layer), name) for name, layer in setting_owners().items() if layer in LAYERS}


def _fit(prompts: list[list[int]], output_lens: list[int], config: EngineConfig) -> list[str]:
    """Make the ids those of the model, and say so. Raises ConfigError for a request that is too long."""
    longest = max(len(prompt) + length for prompt, length in zip(prompts, output_lens, strict=True))
    if longest > config.max_model_len:
        raise ConfigError(
            f"the longest request has {longest} tokens in and out, and max_model_len is {config.max_model_len}: "
            "choose smaller --input-len and --output-len",
            "max_model_len",
        )
    vocab_size = config.resolved_checkpoint.vocab_size
    if vocab_size > MAX_TOKEN_ID:
        return []
    for prompt in prompts:
        prompt[:] = [token % vocab_size for token in prompt]
    return [f"token ids of 0 to {MAX_TOKEN_ID} are taken modulo {vocab_size}, the model's vocabulary"]


def measure(
    settings: dict[str, Any], prompts: list[list[int]], output_lens: list[int], temperature: float, num_runs: int
) -> list[dict[str, Any]]:
    """Start the engine, warm it up, and answer all prompts at once, so many times; the prefix cache is emptied between.

    Raises EngineError when a request fails or comes back short.
    """
    from nanoengine import LLM

    params = [SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=length) for length in output_lens]
    began = time.perf_counter()
    with LLM(**settings) as llm:
        start_seconds = time.perf_counter() - began
        warm_up = SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=min(_WARM_UP, output_lens[0]))
        llm.generate([[1] * min(_WARM_UP, len(prompts[0]))], warm_up, use_tqdm=False)
        runs = []
        for _ in range(num_runs):
            llm.reset_prefix_cache()
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
            seconds = time.perf_counter() - began
            runs.append(_figures(outputs, output_lens, seconds) | {"start_s": round(start_seconds, 2)})
    return runs


def _figures(outputs: list[Any], output_lens: list[int], seconds: float) -> dict[str, Any]:
    for number, (output, length) in enumerate(zip(outputs, output_lens, strict=True)):
        last = output.outputs[0]
        if last.finish_reason != "length" or len(last.token_ids) != length:
            why = last.error or f"{last.finish_reason} after {len(last.token_ids)} of {length} tokens"
            raise EngineError(f"request {number} did not come to its end: {why}")
    input_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    output_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    return {
        "seconds": round(seconds, 4),
        "requests": len(outputs),
        "input_tokens": input_tokens,
        "output_tokens": output_tokens,
        "requests_per_s": round(len(outputs) / seconds, 4),
        "input_tokens_per_s": round(input_tokens / seconds, 2),
        "output_tokens_per_s": round(output_tokens / seconds, 2),
        "total_tokens_per_s": round((input_tokens + output_tokens) / seconds, 2),
        "cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs),
        "preemptions": sum(output.metrics.num_preemptions for output in outputs),
    }


def render(figures: dict[str, Any]) -> str:
    """One run in three lines."""
    return "\n".join(
        [
            f"{figures['requests']} requests, {figures['input_tokens']} tokens in and {figures['output_tokens']} out, "
            f"in {figures['seconds']:.2f} s (after a start of {figures['start_s']:.1f} s)",
            f"a second: {figures['output_tokens_per_s']:.1f} tokens out, {figures['input_tokens_per_s']:.1f} in, "
            f"{figures['total_tokens_per_s']:.1f} in all; {figures['requests_per_s']:.2f} requests",
            f"preemptions: {figures['preemptions']}, tokens from the prefix cache: {figures['cached_tokens']}",
        ]
    )
