"""What tests of processes share: short private directories, family trees, and proof that nothing was left."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """pytest's own directories may be longer than a socket's path can be."""
    path = Path(tempfile.mkdtemp(prefix="nano", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def alive(pids: Iterable[int]) -> list[int]:
    """Those of `pids` that still run; one that ended and waits for init to notice does not."""
    running = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                running.append(pid)
    return running


def descendants(pid: int | None = None) -> list[int]:
    """All processes below `pid` (default: this one), multiprocessing's resource tracker aside.

    The tracker belongs to the process that spawns, and ends with it.
    """
    pids = []
    for child in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if "resource_tracker" not in " ".join(child.cmdline()):
                pids.append(child.pid)
    return alive(pids)


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def leaked_memory(before: set[str]) -> set[str]:
    """Names that have come to /dev/shm since `before`, unless a living process holds what they name.

    What ended without cleaning up is held by nobody. Other programs on the machine, a browser say, come and go.
    """
    found = shared_memory() - before
    for pid in psutil.pids() if found else ():
        with contextlib.suppress(OSError):
            held = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            held += "".join(f"{os.readlink(each)}\n" for each in Path(f"/proc/{pid}/fd").iterdir())
            found = {name for name in found if f"/dev/shm/{name}\n" not in held}
    return {name for name in found if os.path.exists(f"/dev/shm/{name}")}


def open_descriptors() -> dict[int, str]:
    """The descriptors that this process holds, and what they stand for."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the others
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that `pids` have used so far."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return sum(each.user + each.system for each in times)
