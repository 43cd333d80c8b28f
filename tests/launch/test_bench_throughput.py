"""`bench throughput`: the requests are nano-vllm's to the token, what cannot fit is refused, a small run adds up."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from launch.bench import __main__ as bench
from launch.bench.throughput import Workload


def run_bench(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench", "throughput", *options])
    return bench.main()


def test_the_default_is_the_benchmark_of_nano_vllm() -> None:
    prompts, output_lens = Workload().draw()
    assert len(prompts) == len(output_lens) == 256
    assert sum(map(len, prompts)) == 142_827
    assert sum(output_lens) == 133_966
    random.seed(0)
    first = [random.randint(100, 1024), *(random.randint(0, 10_000) for _ in range(len(prompts[0])))]
    assert first == [len(prompts[0]), *prompts[0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-requests", "0"], "--num-requests must be at least 1"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--input-len", "9", "5"], "--input-len must be 1 <= MIN <= MAX, got 9 5"),
        (["--output-len", "0", "5"], "--output-len must be 1 <= MIN <= MAX, got 0 5"),
        (["--output", "not/there/x.json"], "there is no folder not/there"),
        (["--", "--max-model-len", "2000"], "2011 tokens in and out, and max_model_len is 2000"),
        (["--", "--max-modl-len", "2000"], "did you mean --max-model-len?"),
        (["--", "--tp", "3"], "tensor_parallel_size must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert run_bench(monkeypatch, *options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_small_run_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With so few blocks that requests must wait for each other, and twice on one engine."""
    file = tmp_path / "figures.json"
    options = ["--num-requests", "6", "--input-len", "20", "40", "--output-len", "10", "20", "--runs", "2"]
    engine = ["--", "--num-kv-blocks", "8", "--max-model-len", "64", "--log-level", "warning"]
    assert run_bench(monkeypatch, *options, "--output", str(file), *engine) == 0
    prompts, output_lens = Workload(6, (20, 40), (10, 20)).draw()
    report = json.loads(file.read_text())
    assert len(report["runs"]) == 2
    for run in report["runs"]:
        assert run["input_tokens"] == sum(map(len, prompts))
        assert run["output_tokens"] == sum(output_lens)
        assert run["output_tokens_per_s"] == pytest.approx(run["output_tokens"] / run["seconds"], rel=0.01)
        assert run["preemptions"] >= 0
    assert report["engine_options"] == engine[1:]
    assert report["notes"] == ["token ids of 0 to 10000 are taken modulo 2048, the model's vocabulary"]
    out = capsys.readouterr().out
    assert "modulo 2048" in out
    assert "median: " in out
