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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.server.metrics import Numbers, ServerMetrics

SHARE_SECONDS = 0.5


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
        self._path = directory / f"{os.getpid()}-{uuid.uuid4().hex}.json"
        self._timer: asyncio.TimerHandle | None = None
        metrics.on_change = self._write_soon

    def sum(self) -> Numbers:
        """Everybody's as they last told, and our own of now."""
        together = Numbers(self._max_model_len)
        together.add(self._metrics.numbers.to_dict())
        for data in self._others():
            together.add(data)
        return together

    def write(self) -> None:
        """Tell the others: all of it, or nothing if the directory is gone."""
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps(self._metrics.numbers.to_dict()), encoding="utf-8")
            part.replace(self._path)

    def _others(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._path.parent.glob("*.json")):
            if path != self._path:
                with contextlib.suppress(OSError):
                    yield json.loads(path.read_text(encoding="utf-8"))

    def _write_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SHARE_SECONDS, self._write_and_go_on)

    def _write_and_go_on(self) -> None:
        self._timer = None
        self.write()
        if self._metrics.num_open:  # their tokens are counted meanwhile
            self._write_soon()
