"""A program on a terminal of its own, typed at and read as a person would; Ctrl-C there is the terminal's own."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import subprocess
import sys
import time
from types import TracebackType

from tests.launch.server_process import ROOT

# Makes the terminal the controlling one, without which Ctrl-C would be a character like any other.
_RUN = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module({!r}, run_name='__main__')"
_ESCAPES = re.compile(r"\x1b\[\?\d+[hl]")  # readline's: bracketed paste on and off


class PseudoTerminal:
    """`python -m module arguments…` on a new terminal. `seen` is all that appeared there so far."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _RUN.format(module), *arguments],
            cwd=ROOT,
            env=os.environ | {"TERM": "dumb"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
        )
        os.close(slave)
        self.seen = ""
        self._at = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def expect(self, text: str, seconds: float = 60.0) -> str:
        """Wait until `text` appears behind what was expected before; returns what came in between."""
        deadline = time.monotonic() + seconds
        while (found := self.seen.find(text, self._at)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"{text!r} did not appear; behind {self._at}: {self.seen[self._at :]!r}"
            assert self._read(left), f"the program ended before {text!r} appeared: {self.seen!r}"
        before, self._at = self.seen[self._at : found], found + len(text)
        return before

    def type(self, text: str) -> None:
        """Type it; a newline is the return key."""
        os.write(self._master, text.encode())

    def control(self, letter: str) -> None:
        """Press Ctrl and a letter."""
        os.write(self._master, bytes([ord(letter.upper()) - 64]))

    def end(self, seconds: float = 60.0) -> int:
        """Wait for the program's end; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._read(max(0.0, deadline - time.monotonic())):
            pass
        return self.process.wait(max(1.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Close the window. Harmless twice."""
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def _read(self, seconds: float) -> bool:
        """Take what comes, waiting so long for it; False at the end, or when nothing came."""
        if not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux says so when nobody has the other side open any more
            return False
        self.seen += _ESCAPES.sub("", self._decoder.decode(data).replace("\r\n", "\n"))
        return bool(data)

    def __enter__(self) -> PseudoTerminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
