"""Adds up what several front-end processes count: each keeps a file with its numbers in a directory that they share.

The files are written while there is work, at most so often as `SHARE_SECONDS` says; so a scrape of one front end sees
its own numbers as they are, and those of the others up to that much older. It knows no request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import uuid
from pathlib import Path

from launch.server.metrics import Numbers, ServerMetrics

SHARE_SECONDS = 0.5


def write_numbers(path: Path, numbers: Numbers) -> None:
    """Tell the front ends that share the directory: all of it, or nothing if the directory is gone."""
    part = path.with_suffix(".part")
    with contextlib.suppress(OSError):
        part.write_text(json.dumps(numbers.to_dict()), encoding="utf-8")
        part.replace(path)


class OwnerNumbers:
    """What the process counts that owns the front ends: their deaths, and the requests which they took with them."""

    def __init__(self, max_model_len: int) -> None:
        self._numbers, self._max_model_len = Numbers(max_model_len), max_model_len
        self._settled: set[Path] = set()  # a process id may come again

    def note_restart(self, directory: Path, pid: int) -> None:
        """A front end was started in place of `pid`, whose requests, as far as it had told of them, ended with it."""
        told = Numbers(self._max_model_len)
        for path in set(directory.glob(f"{_prefix(pid)}*.json")) - self._settled:
            self._settled.add(path)
            _add_file(told, path)
        self._numbers.count("front_end_restarts")
        self._numbers.count("request_failure", "error", by=told.num_open)
        write_numbers(directory / "owner.json", self._numbers)


def _prefix(pid: int) -> str:
    return f"{pid}-"


def _add_file(numbers: Numbers, path: Path) -> None:
    with contextlib.suppress(OSError):
        numbers.add(json.loads(path.read_text(encoding="utf-8")))


class SharedNumbers:
    """The numbers of all front ends that ever wrote into a directory.

    A file outlives its writer: a counter must not go back when a front end is started again. The directory ends with
    the engine.

    Args:
        metrics: our own; from now on its changes are told to the others. It is used on an event loop.
    """

    def __init__(self, directory: Path, metrics: ServerMetrics, max_model_len: int) -> None:
        directory.mkdir(mode=0o700, exist_ok=True)
        self._metrics, self._max_model_len = metrics, max_model_len
        self._path = directory / f"{_prefix(os.getpid())}{uuid.uuid4().hex}.json"
        self._timer: asyncio.TimerHandle | None = None
        metrics.on_change = self._write_soon

    def sum(self) -> Numbers:
        """Everybody's as they last told, and our own of now."""
        together = Numbers(self._max_model_len)
        together.add(self._metrics.numbers.to_dict())
        for path in sorted(self._path.parent.glob("*.json")):
            if path != self._path:
                _add_file(together, path)
        return together

    def write(self) -> None:
        """Tell the others."""
        write_numbers(self._path, self._metrics.numbers)

    def _write_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SHARE_SECONDS, self._write_and_go_on)

    def _write_and_go_on(self) -> None:
        self._timer = None
        if self._metrics.num_open:  # their tokens are counted meanwhile
            self._write_soon()
        self.write()
