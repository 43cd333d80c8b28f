"""`python -m launch` as a child, for tests of the real thing."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class ServerProcess:
    """A server on a free port with the given options; what it printed is in `out` and `err`.

    With `run_base`, its run directory is made in there.
    """

    def __init__(self, *arguments: str, run_base: Path | None = None) -> None:
        own = {} if run_base is None else {"XDG_RUNTIME_DIR": str(run_base), "TMPDIR": str(run_base)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch", "--port", "0", *arguments],
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

    def wait_ready(self, seconds: float = 60.0) -> str:
        """The server's address, once it says that it is ready."""
        deadline = time.monotonic() + seconds
        while not self.out:
            assert self.process.poll() is None, "".join(self.err)
            assert time.monotonic() < deadline, "".join(self.err)
            time.sleep(0.02)
        found = re.match(r"nanoengine ready: (http://\S+) \(model=demo, tp=\d\)$", self.out[0])
        assert found is not None, self.out
        return found[1]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 3.0) -> int:
        """Send a signal; returns the exit code. Raises TimeoutExpired when it takes longer."""
        self.process.send_signal(number)
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(5)
        return code

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        for reader in self._readers:
            reader.join(5)
