"""What a model directory may do to whoever loads it: nothing; also under -O, which drops assertions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.hostile_models import HARMLESS, changes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("options", [[], ["-O"]], ids=["plainly", "optimised"])
def test_every_hostile_directory_is_refused_with_an_error_of_ours(options: list[str], tmp_path: Path) -> None:
    command = [sys.executable, *options, "-m", "tests.end_to_end.hostile_models", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    tried = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["name"] for each in tried] == list(changes())
    wrong = {each["name"]: each["said"] for each in tried if not each["said"].startswith("refused: ")}
    assert wrong.keys() == HARMLESS, wrong
    assert set(wrong.values()) == {"loaded"}
    assert not [each["name"] for each in tried if each["canary"]]
    assert {each["name"]: each["seconds"] for each in tried if each["seconds"] > 3} == {}
