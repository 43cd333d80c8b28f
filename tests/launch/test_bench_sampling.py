"""`sampling` and `decode-gap` small: every kind is measured, a model's step too, and the JSON holds the table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.bench import __main__ as bench
from launch.bench.decode_gap import Gaps, figures
from launch.bench.sampling import QWEN3_0_6B, measure, render
from launch.bench.sampling_steps import HISTORY, KINDS

SMALL = QWEN3_0_6B | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}


def test_every_kind_of_sampling_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--batch", "3", "--vocab-size", str(HISTORY), "--steps", "2", "--threads", "1", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["bench", "sampling", *options])
    bench.main()
    results = json.loads(file.read_text())
    assert [result["kind"] for result in results] == [kind.name for kind in KINDS]
    assert all(0 < result["p10"] <= result["median"] <= result["p90"] for result in results)
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(KINDS)
    monkeypatch.setattr("sys.argv", ["bench", "sampling", "--vocab-size", "50"])
    assert bench.main() == 2
    assert f"--vocab-size must be at least {HISTORY}, got 50" in capsys.readouterr().err


def test_whole_steps_of_a_model_without_a_file_are_measured() -> None:
    results = measure(num_rows=3, vocab_size=1500, num_steps=20, model_step=True, shape=SMALL)
    assert results[0]["added_share"] == results[0]["added_cpu_share"] == 0
    assert render(results).splitlines()[0].endswith("| added wall | added CPU |")


def test_gaps_are_told_as_multiples_of_the_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    options = ["--gaps", "3", "--streams", "2", "--prompts", "2", "--prompt-tokens", "300", "--runs", "1"]
    monkeypatch.setattr("sys.argv", ["bench", "decode-gap", *options, "--json", str(file)])
    bench.main()
    (result,) = json.loads(file.read_text())
    assert result["max_decode_gap"] == 3
    assert 0 < result["p50"] <= result["p90"] <= result["p99"] <= result["max"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert figures(0, Gaps([0.01, 0.02, 0.03], [1.0, 4.0], [2.0]))["undisturbed_ms"] == 20
