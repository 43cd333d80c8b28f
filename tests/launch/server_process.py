"""`python -m launch` as a child, for tests of the real thing."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A child whose output is read as it comes: lines, in `out` and `err`."""

    def __init__(self, command: Sequence[str], **own: str) -> None:
        """`own` are variables of its environment, beside ours."""
        self.process = subprocess.Popen(
            [*command],
            cwd=ROOT,
            env=os.environ | own,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.out: list[str] = []
        self.err: list[str] = []
        pairs = ((self.process.stdout, self.out), (self.process.stderr, self.err))
        self._readers = [threading.Thread(target=self._read, args=pair, daemon=True) for pair in pairs]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(pipe: Any, lines: list[str]) -> None:
        lines.extend(iter(pipe.readline, ""))  # extend takes each line as it comes
        pipe.close()

    def until(self, condition: Callable[[], object], seconds: float = 100.0) -> None:
        """Wait for it; fails with what was printed when it does not come, or when the program ends before."""
        until(lambda: condition() or self.process.poll() is not None, seconds, why=lambda: "".join(self.err))
        assert condition(), "".join(self.err)

    def stop(self, number: int | None = signal.SIGTERM, seconds: float = 15.0) -> int:
        """Send a signal, if any, and wait for the end; returns the exit code. Raises TimeoutExpired.

        What holds up an end in these tests does so for a minute.
        """
        if number is not None:
            self.process.send_signal(number)
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.stop(None)


class ServerProcess(Program):
    """A server on a free port with the given options. With `run_base`, its run directory is made in there."""

    def __init__(self, *arguments: str, run_base: Path | None = None) -> None:
        own = {} if run_base is None else {"XDG_RUNTIME_DIR": str(run_base), "TMPDIR": str(run_base)}
        super().__init__([sys.executable, "-m", "launch", "--port", "0", *arguments], **own)

    def wait_ready(self, seconds: float = 100.0) -> str:
        """The server's address, once it says that it is ready."""
        self.until(lambda: self.out, seconds)
        found = re.match(r"nanoengine ready: (http://\S+) \(model=demo, tp=\d\)$", self.out[0])
        assert found is not None, self.out
        return found[1]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Stop the scheduler's process meanwhile: streams rest where they are, however fast the model is.

        The front ends serve on. It may last some seconds; then a scheduler counts as hung, and is replaced.
        """
        (scheduler,) = (
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if "nanoengine.engine" in child.cmdline()
        )
        scheduler.suspend()
        try:
            yield
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):  # it took too long
                scheduler.resume()
