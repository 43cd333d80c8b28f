"""Command lines that cannot be: one line that says why, exit code 2, and nothing started."""

from __future__ import annotations

import pytest

from launch.bench import __main__ as bench
from launch.chat import __main__ as chat_program

BAD = [
    ("", "the following arguments are required: command"),
    ("nothing", "invalid choice: 'nothing'"),
    ("serve --nope", "unrecognized arguments: --nope"),
    ("serve --num-prompts x", "argument --num-prompts: invalid int value: 'x'"),
    ("serve --request-rate 0", "--request-rate must be greater than 0, got 0"),
    ("serve --dataset jsonl", "--dataset-path"),
    ("throughput --nope", "unrecognized arguments: --nope"),
    ("throughput --num-requests 0", "--num-requests must be at least 1, got 0"),
    ("throughput --temperature -1", "--temperature must be at least 0, got -1"),
    ("lifecycle --runs 0", "--runs must be at least 1, got 0"),
    ("lifecycle --idle-seconds -1", "--idle-seconds must be at least 0, got -1"),
    ("lifecycle --idle-seconds soon", "--idle-seconds must be a number, got 'soon'"),
    ("lifecycle --runs 1 -- --tp 0", "tensor_parallel_size must be at least 1"),
    ("control-plane --steps 0", "--steps must be at least 1, got 0"),
    ("control-plane --tp 65", "--tp must be at least 1 and at most 64, got 65"),
    (
        "control-plane --json not/there/x",
        "--json must be a file to write, got 'not/there/x': there is no folder not/there",
    ),
    ("simulate --requests 0", "--requests must be at least 1, got 0"),
    ("simulate --rate 0", "--rate must be greater than 0, got 0"),
    ("simulate --prefix-share 2", "--prefix-share must be at most 1, got 2"),
    ("simulate --step-base nan", "--step-base must be a number, got 'nan'"),
    ("simulate --policy lifo", "argument --policy: invalid choice: 'lifo'"),
    ("sampling --batch 0", "--batch must be at least 1, got 0"),
    ("sampling --threads two", "--threads must be a whole number, got 'two'"),
    ("sampling --json .", "it is a folder"),
    ("decode-gap --gaps -1", "--gaps must be at least 0, got -1"),
    ("decode-gap --streams 0", "--streams must be at least 1, got 0"),
    ("decode-gap --model nobody", "nobody"),
    ("front-end --streams 0", "--streams must be at least 1, got 0"),
    ("front-end --rate 0", "--rate must be greater than 0, got 0"),
    ("front-end --seconds x", "--seconds must be a number, got 'x'"),
]


@pytest.mark.parametrize(("line", "message"), BAD, ids=[line for line, _ in BAD])
def test_a_measurement_that_cannot_be_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    monkeypatch.setattr("sys.argv", ["bench", *line.split()])
    assert bench.main() == 2
    told = capsys.readouterr()
    (only,) = told.err.splitlines()
    assert only.startswith("python -m launch.bench")
    assert message in only
    assert not told.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--max-tokens x", "--max-tokens must be a whole number, got 'x'"),
        ("--temperature -1", "--temperature must be at least 0, got -1"),
        ("--temperature hot", "argument --temperature: invalid float value: 'hot'"),
        ("--top-p 2", "--top-p must be greater than 0 and at most 1, got 2"),
        ("--base-url http://127.0.0.1:1 --seed -1", "--seed must be at least 0"),
    ],
)
def test_a_chat_that_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], line: str, message: str) -> None:
    assert chat_program.main(line.split()) == 2
    (only,) = capsys.readouterr().err.splitlines()
    assert only.startswith("launch.chat: error: ")
    assert message in only
