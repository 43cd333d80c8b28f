"""What the kernel says of a tree of processes: members, CPU time, memory; Linux's /proc only. Knows no engine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """`root` and all its descendants that are alive."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        if alive(pid):
            found.append(pid)
        todo.extend(children.get(pid, []))
    return found


def alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    fields = _stat(pid)
    return bool(fields) and fields[0] != "Z"


def with_variable(name: str, value: str) -> list[int]:
    """Those of all living processes of this user that were started with this in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and f"{name}={value}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return sorted(filter(alive, found))


def cpu_seconds(pids: list[int]) -> float:
    """User and system time the processes have used so far, in seconds."""
    total = 0
    for pid in pids:
        if fields := _stat(pid):
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def proportional_memory(pids: list[int]) -> int:
    """Sum of the processes' PSS in bytes: shared pages are divided among those who share them."""
    return _memory(pids, ("Pss:",))


def own_memory(pids: list[int]) -> int:
    """What of it belongs to no file: it does not change when another program maps the same libraries."""
    return _memory(pids, ("Pss_Anon:", "Pss_Shmem:"))


def _memory(pids: list[int], fields: tuple[str, ...]) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(fields):
                    total += int(line.split()[1]) * 1024
    return total


def name(pid: int) -> str:
    """What ps shows, at most 15 characters; empty when the process is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    return ""


def num_descriptors(pids: list[int]) -> int:
    """Open files, sockets and so on of the processes."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += len(os.listdir(f"/proc/{pid}/fd"))
    return total


def num_threads(pids: list[int]) -> int:
    """Threads of the processes."""
    return sum(int(fields[17]) for pid in pids if (fields := _stat(pid)))


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return []
