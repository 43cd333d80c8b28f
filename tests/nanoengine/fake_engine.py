"""A scheduler process that is a thread, and follows a script instead of computing; it speaks the real messages."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from configs.engine import EngineConfig
from configs.errors import EngineDeadError, NanoEngineError
from nanoengine import AsyncLLM
from nanoengine.messages import (
    Abort,
    AddRequest,
    BlockMap,
    Deltas,
    EngineState,
    Hello,
    Message,
    Ready,
    StateRequest,
    TokenDelta,
    decode,
    encode,
)
from nanoengine.outputs import RequestOutput
from tests.nanoengine.tokenizers_for_tests import write_byte_level

VOCAB_SIZE = 400  # larger than the tokenizer's, as a padded vocabulary is
MAX_MODEL_LEN = 64
EOS = 342
ENDLESS = [5] * 10**6  # an answer that no test waits for
CHECKPOINT = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": MAX_MODEL_LEN,
    "rms_norm_eps": 1e-6,
    "eos_token_id": EOS,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def write_model(directory: Path) -> Path:
    """A model directory with everything but weights."""
    write_byte_level(directory)
    (directory / "config.json").write_text(json.dumps(CHECKPOINT), encoding="utf-8")
    return directory


def invented_tokens(request: AddRequest) -> list[int]:
    """What the fake model answers: ids that depend on the prompt and the position alone."""
    first = sum(request.prompt_token_ids)
    return [(first + 7 * position) % 256 for position in range(request.params["max_tokens"])]


def expected(prompt: list[int], max_tokens: int = 16) -> list[int]:
    """What the fake model answers to a prompt."""
    return invented_tokens(AddRequest("", "", prompt, {"max_tokens": max_tokens}, 0, 0.0, 0, [[]]))


async def collect(llm: AsyncLLM, *args: Any, **more: Any) -> list[RequestOutput]:
    """All outputs of one `AsyncLLM.generate`."""
    return [output async for output in llm.generate(*args, **more)]


class FakeEngineProcess:
    """Stands for `EngineProcess`; `script` decides what a request is answered with.

    `hold` keeps requests waiting until it is cleared. `inject` sends a message as it is. `die` ends the process.
    `on_step`, where there is one, is called in the scheduler's thread before the next tokens are sent.
    """

    made: list[FakeEngineProcess] = []  # noqa: RUF012  # all instances, for the tests to find theirs
    start_error: NanoEngineError | None = None  # what wait_ready raises
    start_gate: threading.Event | None = None  # what wait_ready waits for

    def __init__(self, config: EngineConfig, incarnation: int = 1, *_: object) -> None:
        self.config = config
        self.incarnation = incarnation
        self.tokens_of: Callable[[AddRequest], list[int]] = invented_tokens
        self.script: Callable[[AddRequest], list[Message]] | None = None
        self.on_step: Callable[[], object] | None = None
        self.hold = threading.Event()
        self.received: list[Message] = []
        self.aborted: list[Abort] = []
        self.tokens_per_step = 1
        self.is_mute = False
        self.stops = 0
        self.pid = 0
        self.is_stopped = self.has_progressed = self.is_hopeless = False
        self.reason = "died"
        self._live: dict[str, tuple[AddRequest, int]] = {}
        self._client = b""
        self._injected: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._failure: NanoEngineError | None = None
        self._stopped = threading.Event()
        self._stop_lock = threading.Lock()  # the keeper's thread stops it, and the keeper's owner at the same time
        self._is_closed = False
        self._thread: threading.Thread | None = None
        FakeEngineProcess.made.append(self)

    # -- EngineProcess ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._read_fd, self._write_fd = os.pipe()
        self._directory = tempfile.mkdtemp()
        self.address = f"ipc://{self._directory}/front"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def wait_ready(self, timeout: float | None = None) -> None:
        if self.start_gate is not None:
            while not self.start_gate.wait(0.01):
                if self._stopped.is_set():
                    raise EngineDeadError("stopped while it started")
        if self.start_error is not None:
            raise self.start_error

    def failure(self) -> NanoEngineError | None:
        return self._failure

    def fileno(self) -> int:
        return self._read_fd

    @property
    def was_stopped(self) -> bool:
        return self._stopped.is_set()

    def wait(self, timeout: float | None) -> None:
        """As long as nothing happens; a byte in the pipe stays there."""
        with contextlib.suppress(OSError):
            select.select([self._read_fd], [], [], 0.05)

    def kill(self, error: NanoEngineError) -> None:
        self._failure = self._failure or error

    def stop(self, timeout: float = 3.0) -> None:
        self.stops += 1
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
            with self._stop_lock:
                if not self._is_closed:
                    self._is_closed = True
                    os.close(self._read_fd)
                    os.close(self._write_fd)
                    shutil.rmtree(self._directory)

    # -- for the tests ------------------------------------------------------------------------------------------

    def die(self, message: str = "killed by signal 9") -> None:
        self._failure = EngineDeadError(message)
        os.write(self._write_fd, b"x")

    def inject(self, message: Message) -> None:
        self._injected.put(message)

    @property
    def added(self) -> list[AddRequest]:
        return [message for message in self.received if isinstance(message, AddRequest)]

    # -- the thread ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        context = zmq.Context()
        router = context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.bind(self.address)
        while not self._stopped.is_set():
            if router.poll(self._pause_ms()):
                self._client, frame = router.recv_multipart()
                self._take(decode(frame), lambda message: router.send_multipart([self._client, encode(message)]))
                continue
            while not self._injected.empty():
                router.send_multipart([self._client, encode(self._injected.get())])
            if self._live and not self.hold.is_set():
                if self.on_step is not None:
                    self.on_step()
                router.send_multipart([self._client, encode(Deltas(self.incarnation, self._step()))])
        router.close()
        context.term()

    def _pause_ms(self) -> int:
        if not self._live or self.hold.is_set():
            return 2
        # An answer that nobody waits for must not keep its reader busy: tests do other things meanwhile.
        return int(all(self.tokens_of(request) is ENDLESS for request, _ in self._live.values()))

    def _take(self, message: Message, send: Callable[[Message], None]) -> None:
        if self.is_mute:
            return
        self.received.append(message)
        if isinstance(message, Hello):
            send(Ready(self.incarnation, 8, 16, MAX_MODEL_LEN, "float32", "cpu"))
        elif isinstance(message, StateRequest):
            send(self._state())
        elif isinstance(message, AddRequest) and self.script is not None:
            for each in self.script(message):
                send(each)
        elif isinstance(message, AddRequest):
            self._live[message.request_id] = (message, len(message.journal[0]))
        elif isinstance(message, Abort):
            self.aborted.append(message)
            self._live.pop(message.request_id, None)

    def _state(self) -> EngineState:
        nothing = BlockMap(8, 8, 1, 0, 0, 0, bytes(8), bytes(8), bytes(8))
        return EngineState(
            self.incarnation, time.time(), len(self._live), 0, 0, 0, 0, 0, 0, nothing, nothing, [], bytes(8), []
        )

    def _step(self) -> list[TokenDelta]:
        deltas = []
        for name, (request, start) in list(self._live.items()):
            tokens = self.tokens_of(request)
            end = min(len(tokens), start + self.tokens_per_step)
            reason = None if end < len(tokens) else "stop" if tokens[-1] == EOS else "length"
            # All sequences alike, and at the same pace.
            deltas += [TokenDelta(name, i, start, tokens[start:end], reason) for i in range(len(request.journal))]
            self._live[name] = (request, end)
            if reason is not None:
                del self._live[name]
        return deltas
