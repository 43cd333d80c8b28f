"""A server that belongs to the program which starts it: it takes no Ctrl-C, and does not outlive the program.

Run as a program, `python -m launch.tied_server PID OPTIONS…`, it is `python -m launch OPTIONS…` that stops when process
PID dies, whichever way that dies. It knows nothing of what it is asked.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import IO

from configs.errors import EngineError
from launch.keys import KEY_VARIABLE
from nanoengine._packages import child_environment
from nanoengine.processes import describe_exit, set_death_signal

STOP_SECONDS = 15.0
_READY = re.compile(r"nanoengine ready: (http://\S+)")


class TiedServer:
    """A server on a free port of this machine, from `with` to the end of its block.

    Its log goes to this program's standard error, warnings and worse unless the options say otherwise. To be started
    from the main thread: the kernel ties the server to the thread that starts it.

    Args:
        options: of `python -m launch`.
        variables: put into its environment.
        log: where its log goes instead.

    Attributes:
        url: its address, once it is ready.
        pid: of its first process, once it is started.
        exit_code: once it has ended.

    Raises:
        EngineError: it ended before it was ready; it has said why.
    """

    def __init__(
        self, options: Sequence[str], variables: Mapping[str, str] | None = None, log: IO[bytes] | None = None
    ) -> None:
        self._variables, self._log = dict(variables or {}), log
        self._command = [sys.executable, "-m", "launch.tied_server", str(os.getpid())]
        self._command += ["--host", "127.0.0.1", "--port", "0", "--log-level", "warning", *options]
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.pid = 0
        self.exit_code: int | None = None

    def __enter__(self) -> TiedServer:
        environment = child_environment() | self._variables
        environment.pop(KEY_VARIABLE, None)  # it listens to this machine alone, and this program has no key to show
        # A session of its own: Ctrl-C at the terminal goes to the whole group of the program in front.
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
            start_new_session=True,
        )
        self.pid = self._process.pid
        try:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                if match := _READY.match(line):
                    self.url = match[1]
                    return self
            raise EngineError(f"the server did not start: {describe_exit(self._process.wait())}")
        except BaseException:
            self.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """Stop it and wait for its end; kill it when it takes too long, or when waiting is interrupted."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            process.kill()
            self.exit_code = process.wait()
            assert process.stdout is not None
            process.stdout.close()


def main() -> int:
    """Tie this process to another one, then serve."""
    if not set_death_signal(signal.SIGTERM, int(sys.argv[1])):
        return 1  # it is gone already
    from launch.cli import main as serve

    return serve(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
