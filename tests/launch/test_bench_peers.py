"""`bench peers`: the same work for every engine, columns of those that are installed, failures in their columns."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from launch.bench import __main__ as bench
from launch.bench.peer_workloads import make, run

# What a peer's script does, without an engine.
FAKE = """
import json, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
names, reps = options["--workloads"].split(","), int(options["--reps"])
if __file__.endswith("run_hf.py"):
    sys.exit("this engine is broken")
figures = {"out_tok_s": 50.0, "ms_per_step": 8.0, "wall_s": 2.0, "prompt_tok_s": 9.0}
json.dump({"load_s": 3.0, "runs": {name: [figures] * reps for name in names}}, open(options["--out"], "w"))
"""


@pytest.fixture
def peers(tmp_path: Path) -> list[str]:
    """Options that name two peers: one that works and one that fails."""
    for venv, script in (("vllm", "run_vllm.py"), ("base", "run_hf.py")):
        python = tmp_path / "venvs" / venv / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)
        (tmp_path / "scripts").mkdir(exist_ok=True)
        (tmp_path / "scripts" / script).write_text(FAKE)
    return ["--peer-scripts", str(tmp_path / "scripts"), "--peer-venvs", str(tmp_path / "venvs")]


def run_bench(monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr("sys.argv", ["bench", "peers", *options])
    return bench.main()


def test_engines_are_given_other_work() -> None:
    prompts, lengths = make("W1", 8192, 0)
    assert (sum(map(len, prompts)), sum(lengths)) == (4004, 2381)
    assert make("W1", 8192, 0)[0] == prompts
    assert make("W1", 8192, 1)[0] != prompts
    assert make("W1", 8192, 1)[1] == lengths
    prompts, lengths = make("W4", 8192, 0)
    assert len({tuple(prompt[:512]) for prompt in prompts}) == 1
    assert len({tuple(prompt) for prompt in prompts}) == 16
    assert min(min(prompt) for prompt in prompts) >= 300
    for wrong in ("W9", "S", "S0", "Sx", ""):
        with pytest.raises(ConfigError, match="workload must be one of"):
            make(wrong, 8192, 0)


def test_a_step_is_timed_with_its_prompt() -> None:
    asked: list[tuple[int, list[int]]] = []

    def generate(prompts: list[list[int]], lengths: list[int]) -> list[int]:
        asked.append((len(prompts), lengths))
        return lengths

    figures = run("S3", generate, 8192, 0)
    assert asked == [(3, [1] * 3), (3, [65] * 3)]
    assert figures["ms_per_step"] == pytest.approx(1e3 * (figures["total_s"] - figures["first_token_s"]) / 64)
    run("W4w", generate, 8192, 0)
    assert [count for count, _ in asked[2:]] == [1, 15]


def test_columns_do_not_add_up(
    tmp_path: Path, peers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours, a peer that works and one that fails; the failure shows, and the rest is measured all the same."""
    file = tmp_path / "figures.json"
    options = ["--workloads", "S2,W4", "--reps", "1", "--turns", "1", "--memory", "--output", str(file), *peers]
    assert run_bench(monkeypatch, *options, "--", "--log-level", "warning") == 1
    turns = json.loads(file.read_text())["turns"]
    assert [*turns] == ["nanoengine", "vllm", "transformers"]
    (own,), (other,), (broken,) = turns.values()
    assert "error" not in own
    assert own["peak_pss"] > 2**26
    assert other["runs"]["S2"] == [{"out_tok_s": 50.0, "ms_per_step": 8.0, "wall_s": 2.0, "prompt_tok_s": 9.0}]
    assert broken == {"error": "exit code 1: this engine is broken"}
    table = capsys.readouterr().out
    ratio = 8.0 / own["runs"]["S2"][0]["ms_per_step"]
    (line,) = [line for line in table.splitlines() if "S2, ms a step" in line]
    assert f"8.00 (8.00-8.00), x{ratio:.2f}" in line
    assert line.count("failed") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workloads", "W1,W7"], "workload must be one of W1"),
        (["--turns", "0"], "--turns and --tp must be at least 1"),
        (["--engines", "nanoengine,openvino"], "openvino cannot be run; nanoengine, vllm, transformers can"),
        (["--output", "not/there/x.json"], "there is no folder not/there"),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_what_cannot_be_is_run(
    peers: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert run_bench(monkeypatch, *peers, *options) == 2
    assert message in capsys.readouterr().err
