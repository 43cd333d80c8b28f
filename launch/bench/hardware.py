"""What this machine is, in words for the side of a figure; asks the kernel and package metadata, imports no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path

from nanoengine.processes import num_cores
from nanoengine.version import __version__

_PACKAGES = ("torch", "transformers")


def hardware() -> dict[str, str | int | float | list[str]]:
    """Processor, cores this process may use, memory in GiB, GPUs, versions, and how busy it all is right now."""
    found: dict[str, str | int | float | list[str]] = {
        "cpu": _first(Path("/proc/cpuinfo"), r"model name\s*:\s*(.+)") or platform.machine(),
        "cores": num_cores(),
        "memory_gib": round(int(_first(Path("/proc/meminfo"), r"MemTotal:\s*(\d+)") or 0) / 2**20, 1),
        "gpus": [
            _first(file, r"Model:\s*(.+)") for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        ],
        "python": platform.python_version(),
        "nanoengine": __version__,
    }
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError):
        found["load_average"] = round(os.getloadavg()[0], 2)
    return found


def hardware_line() -> str:
    """The same in one line."""
    found = hardware()
    gpus = found["gpus"]
    assert isinstance(gpus, list)
    parts = [f"{found['cores']} cores of {found['cpu']}", f"{found['memory_gib']} GiB"]
    parts += [f"{len(gpus)} x {gpus[0]}"] if gpus else []
    parts += [f"{name} {found[name]}" for name in ("python", *_PACKAGES, "nanoengine") if name in found]
    return ", ".join([*parts, f"load average {found.get('load_average', 'unknown')}"])


def _first(path: Path, pattern: str) -> str:
    """The first match's group in a file; empty where there is no such file or line."""
    with contextlib.suppress(OSError):
        match = re.search(pattern, path.read_text(errors="replace"))
        if match is not None:
            return match[1].strip()
    return ""
