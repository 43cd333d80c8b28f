"""Runs what needs a GPU and prints the table of benchmarks; see README.md beside it.

    python tests/gpu/run.py [--models 0.6B 8B] [--skip-tests] [--folder DIR]

Each figure stands beside the limit that the same machine was measured to have: the bandwidth of a copy, and the rate
of a bfloat16 matrix product.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from launch.bench.throughput import Workload, measure  # noqa: E402
from nanoengine import LLM, SamplingParams  # noqa: E402
from tests.gpu.checkpoints import QWEN3_06B, QWEN3_8B, Shape, write_checkpoint  # noqa: E402

SHAPES = {"0.6B": QWEN3_06B, "8B": QWEN3_8B}
TESTS = ("tests/gpu", "tests/workers/kernels", "tests/workers/test_cuda_graph.py")


def main() -> int:
    """Run tests, then benchmarks; 0 when the tests passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--folder", type=Path, help="where random checkpoints are kept (default: a temporary one)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device", file=sys.stderr)
        return 1
    failed = 0
    if not arguments.skip_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", *TESTS]  # they would share the GPU's memory
        failed = subprocess.run(command, cwd=ROOT, check=False).returncode
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        bandwidth, rate = copy_bandwidth(), matrix_rate()
        torch.cuda.empty_cache()  # the memory is the engines' now, which are other processes
        print_head(bandwidth, rate)
        for name in arguments.models:
            path = write_checkpoint(folder / SHAPES[name].name, SHAPES[name])
            benchmark(SHAPES[name], path, bandwidth, rate)
    return failed


def print_head(bandwidth: float, rate: float) -> None:
    """Where and with what it was measured."""
    import triton

    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, {now}")
    print(f"copies move {bandwidth / 1e12:.2f} TB/s, bfloat16 products do {rate / 1e12:.0f} TFLOP/s\n")
    print("| model | what | figure | of the measured limit |\n|---|---|--:|--:|", flush=True)


def seconds_of(work: Callable[[], Any], repeats: int) -> float:
    """The median time of a call on the device."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times[2:])[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), 11)


def matrix_rate() -> float:
    """Operations a second of a bfloat16 product of 8,192 squared."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / seconds_of(lambda: a @ b, 11)


def benchmark(shape: Shape, path: Path, bandwidth: float, rate: float) -> None:
    """Print the rows of one model."""
    settings: dict[str, Any] = {"model": str(path), "skip_tokenizer_init": True, "device": "cuda"}
    weights = 2 * (shape.layer_parameters + shape.head_parameters)

    def row(what: str, figure: str, share: float) -> None:
        print(f"| {shape.name} | {what} | {figure} | {100 * share:.0f} % |", flush=True)

    began = time.perf_counter()
    with LLM(**settings, max_model_len=9000, max_num_batched_tokens=8192, max_num_seqs=64) as llm:
        ready = time.perf_counter() - began
        print(f"| {shape.name} | from construction to ready | {ready:.1f} s | |", flush=True)
        single = rate_of(llm, 1, 16, 512)
        row("decode, 1 stream, 16 + 512 tokens", f"{single:.0f} tokens/s", single * weights / bandwidth)
        many = rate_of(llm, 64, 128, 512)
        moved = many * (weights / 64 + shape.kv_bytes * (128 + 256))
        row("decode, 64 streams, 128 + 512 tokens", f"{many:.0f} tokens/s", moved / bandwidth)
        prefill = 8192 * rate_of(llm, 1, 8192, 1)
        attention = 2 * 8192 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim
        row(
            "prefill of 8,192 tokens",
            f"{prefill:.0f} tokens/s",
            prefill * (2 * shape.layer_parameters + attention) / rate,
        )
    prompts, lengths = Workload().draw()
    best = max(
        measure(settings | {"max_model_len": 4096}, prompts, lengths, 0.6, 3),
        key=lambda run: run["output_tokens_per_s"],
    )
    tokens = best["output_tokens_per_s"]
    read = shape.kv_bytes * sum(
        length * len(prompt) + length * length / 2 for prompt, length in zip(prompts, lengths, strict=True)
    )
    row("nano-vllm's benchmark", f"{tokens:.0f} output tokens/s", tokens / sum(lengths) * read / bandwidth)


def rate_of(llm: LLM, num_streams: int, input_len: int, output_len: int) -> float:
    """Output tokens a second of equal streams that start together; the better of two runs."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=output_len)
    best = 0.0
    for attempt in range(3):  # the first one compiles
        prompts = [
            [(7 * i + 13 * stream + attempt) % 10_000 for i in range(input_len)] for stream in range(num_streams)
        ]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        if attempt:
            best = max(best, num_streams * output_len / (time.perf_counter() - began))
    return best


if __name__ == "__main__":
    sys.exit(main())
