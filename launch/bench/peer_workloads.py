"""The work on which engines are compared, and this engine doing it; a process of its own, as each peer has one.

Random token ids from a seed that every engine shares, greedy, no end of sequence, all requests handed over at once:

* W1: 32 requests of 16 to 256 tokens in and 16 to 128 out.
* W2: one of 128 in and 64 out; S1, S32: that many of 128 in and 65 out, told per decode step.
* W3: one of 2,048 in and 1 out.
* W4: 16 that share 512 of 544 tokens, 16 out. W4w: the first of them alone, then the rest.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, EngineError

WORKLOADS = ("W1", "W2", "W3", "W4", "W4w", "S1", "S32")
Requests = tuple[list[list[int]], list[int]]
Generate = Callable[[list[list[int]], list[int]], list[int]]


def make(name: str, vocab_size: int, repetition: int | str) -> Requests:
    """Prompts and the number of tokens to answer each with; the same for every engine. Raises ConfigError."""
    rng, least = random.Random(f"{name}/{repetition}"), min(300, vocab_size // 4)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(least, vocab_size) for _ in range(count)]

    if name == "W1":  # its lengths do not change from one repetition to the next
        of_lengths = random.Random("W1/lengths")
        lengths = [(of_lengths.randint(16, 256), of_lengths.randint(16, 128)) for _ in range(32)]
        return [tokens(length) for length, _ in lengths], [length for _, length in lengths]
    if name == "W2":
        return [tokens(128)], [64]
    if name == "W3":
        return [tokens(2048)], [1]
    if name in ("W4", "W4w"):
        shared = tokens(512)
        return [shared + tokens(32) for _ in range(16)], [16] * 16
    if name[:1] == "S" and name[1:].isdigit() and int(name[1:]) > 0:
        return [tokens(128) for _ in range(int(name[1:]))], [65] * int(name[1:])
    raise ConfigError(f"workload must be one of {', '.join(WORKLOADS)}, or S and a number, got {name!r}", "workloads")


def run(name: str, generate: Generate, vocab_size: int, repetition: int) -> dict[str, float]:
    """One repetition: seconds, and what follows from them, under the names that the peers' result files have."""
    prompts, lengths = make(name, vocab_size, repetition)
    if name == "W2" or name.startswith("S"):
        others, _ = make(name, vocab_size, f"{repetition}/first")
        first = _timed(generate, others, [1] * len(others))
        total = _timed(generate, prompts, lengths)
        step = (total - first) / (lengths[0] - 1)
        return {
            "first_token_s": first,
            "total_s": total,
            "ms_per_step": 1e3 * step,
            "decode_tok_s": len(prompts) / step,
        }
    if name == "W4w":
        seconds = _timed(generate, prompts[:1], lengths[:1]) + _timed(generate, prompts[1:], lengths[1:])
    else:
        seconds = _timed(generate, prompts, lengths)
    return {
        "wall_s": seconds,
        "out_tok_s": sum(lengths) / seconds,
        "prompt_tok_s": sum(map(len, prompts)) / seconds,
    }


def _timed(generate: Generate, prompts: list[list[int]], lengths: list[int]) -> float:
    began = time.perf_counter()
    made = generate(prompts, lengths)
    seconds = time.perf_counter() - began
    if made != lengths:
        raise EngineError(f"answers of {made[:4]} … tokens instead of {lengths[:4]} …")
    return seconds


def main() -> None:
    """Run some workloads on this engine; writes a file like those of the peers' scripts after each."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench.peer_workloads", description=__doc__)
    parser.add_argument("--workloads", required=True, help="names, separated by commas")
    parser.add_argument("--reps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--settings", type=json.loads, required=True, help="keyword arguments of LLM, as JSON")
    parser.add_argument("--vocab-size", type=int, required=True)
    arguments = parser.parse_args()
    began = time.perf_counter()
    from nanoengine import LLM, SamplingParams

    with LLM(**arguments.settings) as llm:
        result: dict[str, Any] = {"load_s": time.perf_counter() - began, "runs": {}}

        def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
            params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=length) for length in lengths]
            return [len(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]

        generate(make("S4", arguments.vocab_size, "warm")[0], [8] * 4)
        for name in arguments.workloads.split(","):
            runs = [run(name, generate, arguments.vocab_size, number) for number in range(arguments.reps)]
            result["runs"][name] = runs
            arguments.out.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
