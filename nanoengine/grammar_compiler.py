"""Checks what form an output is asked to have, in a process that can be killed; knows no request and no worker.

One process a front end, started when the first structured output is asked for, and started again when it had to be
killed. Compiling waits its turn in one thread, off the caller's, so nobody's stream stutters for it. The answers,
good and bad, are kept.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import EngineDeadError, EngineError, NanoEngineError, QueueFullError, RequestError, from_wire
from nanoengine._packages import child_environment
from nanoengine.processes import describe_exit, in_lasting_thread
from nanoengine.structured_outputs import FIELD, StructuredOutputsParams
from nanoengine.watched import watch

logger = logging.getLogger(__name__)

MODULE = "nanoengine.grammar_process"
# What one grammar may take, by the clock; a busy machine included, hence three times the CPU time that it may take.
COMPILE_SECONDS = 1.5
# A process that ends so soon was as good as dead before it was asked, and another one is.
DEAD_SECONDS = 0.1
# Until the process has read its tokenizer, which takes 0.7 s for a vocabulary of 120,000.
START_SECONDS = 30.0
# Whoever has waited this long for a turn is told to come again, and so is who comes behind so many.
MAX_WAIT_SECONDS = 10.0
MAX_WAITING = 1024
_BUSY = "too many structured outputs wait to be compiled; try again later"
# Answers that are kept: at most so many, of so many characters together.
MAX_CACHED = 256
MAX_CACHED_CHARS = 4 * 2**20
# What ran out of time may have met a busy machine: it is tried again after so long.
RETRY_SECONDS = 60.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
    """A grammar, or why there is none; `expires` is a monotonic time."""

    grammar: str = ""
    error: NanoEngineError | None = None
    expires: float = float("inf")

    def resolve(self, future: Future[str]) -> None:
        if self.error is None:
            future.set_result(self.grammar)
        else:  # a new one each time: an exception gathers the traceback of everybody who raises it
            fields = {name: getattr(self.error, name) for name in self.error.fields}
            future.set_exception(type(self.error)(self.error.message, **fields))


class GrammarCompiler:
    """What a front end asks to compile. One thread at a time may call it."""

    def __init__(self, config: EngineConfig) -> None:
        """`config` is resolved. Nothing is started yet."""
        self._config = config
        self._unusable = ""  # what keeps the process from serving
        self._answers: collections.OrderedDict[bytes, _Answer] = collections.OrderedDict()
        self._num_chars = 0
        self._pending: dict[bytes, Future[str]] = {}
        self._lock = threading.Lock()  # of the three above
        self._thread: ThreadPoolExecutor | None = None
        self._process: _CompilerProcess | None = None
        self._closed = False

    def compile(self, params: StructuredOutputsParams) -> Future[str]:
        """The grammar for the workers, as soon as it is there.

        The result raises RequestError where there is none, and QueueFullError when its turn did not come in time.
        Callers of the same grammar share a future: shield it from their cancellation.

        Raises:
            RequestError: this engine gives no structured outputs at all.
            QueueFullError: too many wait.
            EngineDeadError: `close` was called.
        """
        self._check_usable()
        line = json.dumps(params.to_dict()).encode() + b"\n"
        key = hashlib.blake2b(line, digest_size=16).digest()
        future: Future[str] = Future()
        with self._lock:
            answer = self._answers.get(key)
            if answer is not None and answer.expires > time.monotonic():
                self._answers.move_to_end(key)
                answer.resolve(future)
                return future
            if key in self._pending:
                return self._pending[key]
            if len(self._pending) >= MAX_WAITING:
                raise QueueFullError(_BUSY)
            self._pending[key] = future
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammar")
        try:
            work = self._thread.submit(self._work, key, line, params.form, time.monotonic())
            watch(work, "compiling a grammar", lambda error: self._lose(key, future, error))
        except RuntimeError:  # closed a moment ago, in another thread
            self._resolve_pending()
        return future

    def _check_usable(self) -> None:
        if self._closed:
            raise _closed()
        if self._config.model.skip_tokenizer_init:
            why = "the engine runs without a tokenizer (skip_tokenizer_init)"
        elif self._config.tokenizer_file is None:
            why = "the model's tokenizer has no tokenizer.json"
        elif not self._config.resolved_checkpoint.eos_token_ids:
            why = "the model has no end-of-sequence token"
        else:
            why = self._unusable
        if why:
            raise RequestError(f"{FIELD} cannot be given: {why}", FIELD)

    def close(self) -> None:
        """End the process, and what waits for it with an error. Harmless twice."""
        self._closed = True
        if self._process is not None:
            self._process.interrupt()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        if self._process is not None:
            self._process.stop()
        self._resolve_pending()

    def _resolve_pending(self) -> None:
        with self._lock:
            pending, self._pending = list(self._pending.values()), {}
        for future in pending:
            _Answer(error=_closed()).resolve(future)

    def _lose(self, key: bytes, future: Future[str], error: BaseException) -> None:
        """The work broke off somewhere; whoever waits for it hears of it."""
        with self._lock:
            self._pending.pop(key, None)
        if not future.done():
            _failed(error).resolve(future)

    # -- in the thread ------------------------------------------------------------------------------------------

    def _work(self, key: bytes, line: bytes, form: str, since: float) -> None:
        kept = False
        try:
            if time.monotonic() - since > MAX_WAIT_SECONDS:
                raise QueueFullError(_BUSY)
            answer, kept = self._ask(line, form), True
        except NanoEngineError as error:
            answer = _Answer(error=error)
        except Exception as error:
            logger.exception("compiling a grammar failed")
            answer = _failed(error)
        with self._lock:
            future = self._pending.pop(key, None)
            if kept:
                self._remember(key, answer)
        if future is not None:
            answer.resolve(future)
        was_killed = self._process is not None and not self._process.is_alive
        if was_killed and not self._unusable and not self._closed:
            with contextlib.suppress(Exception):  # the next request finds out
                self._ready_process()  # so that it does not wait for the start of another one

    def _ask(self, line: bytes, form: str, again: bool = True) -> _Answer:
        process, began = self._ready_process(), time.monotonic()
        try:
            data = process.ask(line, COMPILE_SECONDS)
        except TimeoutError:
            why = f"it did not compile within {COMPILE_SECONDS} s"
        except EOFError:
            if again and time.monotonic() - began < DEAD_SECONDS and not self._closed:
                process.stop()
                return self._ask(line, form, again=False)
            why = "compiling it took more memory than it may"
        else:
            return _Answer(error=from_wire(data["error"])) if "error" in data else _Answer(data["grammar"])
        logger.warning("the grammar compiler was ended: %s (%s)", why, process.stop())
        if self._closed:
            raise _closed()
        error = RequestError(f"{FIELD}.{form} is too complex: {why}", FIELD)
        return _Answer(error=error, expires=time.monotonic() + RETRY_SECONDS)

    def _ready_process(self) -> _CompilerProcess:
        if self._process is not None and self._process.is_alive:
            return self._process
        if self._process is not None:
            self._process.stop()
        path = self._config.tokenizer_file
        assert path is not None, "checked by compile()"
        self._process = _CompilerProcess(path, self._config.resolved_checkpoint.eos_token_ids)
        if self._closed:  # meanwhile, and `close` may not have seen this one
            self._process.interrupt()
        try:
            data = self._process.receive(START_SECONDS)
        except (TimeoutError, EOFError):
            how = self._process.stop()
            raise _closed() if self._closed else EngineError(f"the grammar compiler did not start: {how}") from None
        if "error" in data:
            self._unusable = from_wire(data["error"]).message
            raise RequestError(f"{FIELD} cannot be given: {self._unusable}", FIELD)
        return self._process

    def _remember(self, key: bytes, answer: _Answer) -> None:
        stale = self._answers.pop(key, None)
        self._num_chars += len(answer.grammar) - (0 if stale is None else len(stale.grammar))
        self._answers[key] = answer
        while len(self._answers) > MAX_CACHED or self._num_chars > MAX_CACHED_CHARS:
            _, oldest = self._answers.popitem(last=False)
            self._num_chars -= len(oldest.grammar)


def _failed(error: BaseException) -> _Answer:
    return _Answer(error=EngineError(f"compiling {FIELD} failed: {type(error).__name__}: {error}"))


def _closed() -> EngineDeadError:
    return EngineDeadError("the engine was closed")


class _CompilerProcess:
    """One `nanoengine.grammar_process`. It ends with us, with this object, and when its socket is closed."""

    def __init__(self, tokenizer_file: Path, eos_token_ids: tuple[int, ...]) -> None:
        self._socket, theirs = socket.socketpair()
        arguments = [sys.executable, "-m", MODULE, f"--socket-fd={theirs.fileno()}", f"--owner-pid={os.getpid()}"]
        arguments += ["--tokenizer", str(tokenizer_file), "--eos", *map(str, eos_token_ids)]
        with theirs:
            # Nobody reads what a library says that runs out of memory: how the process ended is logged here.
            self._process = in_lasting_thread(
                lambda: subprocess.Popen(
                    arguments,
                    env=child_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
            )
        self._received = b""
        self._finalizer = weakref.finalize(self, _end, self._process, self._socket)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._finalizer.alive and self._process.poll() is None

    def ask(self, line: bytes, seconds: float) -> dict[str, Any]:
        """Send a line and wait for its answer. Raises TimeoutError, or EOFError when the process ended."""
        deadline = time.monotonic() + seconds
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(line)
        except TimeoutError:
            raise
        except OSError as error:
            raise EOFError from error
        return self.receive(max(0.001, deadline - time.monotonic()))

    def receive(self, seconds: float) -> dict[str, Any]:
        """Wait for a line. Raises TimeoutError, or EOFError when the process ended."""
        deadline = time.monotonic() + seconds
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError as error:
                raise EOFError from error
            if not chunk:
                raise EOFError
            self._received += chunk
        line, _, self._received = self._received.partition(b"\n")
        data: dict[str, Any] = json.loads(line)
        return data

    def interrupt(self) -> None:
        """Kill the process, upon which whoever waits for it gets EOFError. From any thread."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def stop(self) -> str:
        """Kill and reap the process and close the socket; says how it ended. Harmless twice."""
        self._finalizer()
        return describe_exit(self._process.returncode)


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    connection.close()
