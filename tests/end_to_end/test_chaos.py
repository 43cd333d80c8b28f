"""A server on the demo model under every kind of request and of fault: no answer differs, and nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.bench.chaos.traffic import cases
from tests.launch.server_process import ROOT

SECONDS = float(os.environ.get("NANOENGINE_CHAOS_SECONDS", "25"))


@pytest.mark.timeout(300 + 3 * SECONDS)
def test_no_fault_changes_an_answer(tmp_path: Path) -> None:
    """The whole of `bench chaos`, whose exit code says that nothing was wrong; its figures say that it has looked."""
    file = tmp_path / "chaos.json"
    options = ["--minutes", str(SECONDS / 60), "--seed", "5", "--fault-interval", "1", "--variants", "1"]
    options += ["--json", str(file), "--", "--tp", "2", "--step-timeout", "3"]
    command = [sys.executable, "-m", "launch.bench", "chaos", *options]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said
    told = json.loads(file.read_text())
    assert told["problems"] == [], said
    assert told["by_kind"].keys() == {case.kind for case in cases(5, 1, 80)}
    assert told["recovery_seconds"]["count"] >= 1
    assert told["metrics"]["accepted"] > len(told["by_kind"])
