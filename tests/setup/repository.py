"""What the tests of the set-up share: where the repository is and which files git tracks in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("configs", "nanoengine", "workers", "launch")


def tracked_files() -> list[str]:
    """Paths relative to ROOT of the files that git tracks and that are there; skips the test outside of a clone."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git clone")
    # safe.directory: CI may run as another user than the one who cloned.
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]
