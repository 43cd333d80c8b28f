"""A scheduler process that computes nothing: each step invents a token for each open request, at a chosen pace.

It speaks the real messages, steady decodes as columns included, and merges for a slow front end as the real one does.
`EngineProcess(config, module="launch.bench.instant_engine")` starts it; NANOENGINE_INSTANT_RATE is its pace, in tokens
a second over all requests.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time

import zmq

from nanoengine.engine_process import Bootstrap, receive_bootstrap
from nanoengine.front_socket import FrontSocket
from nanoengine.llm_engine import load_tokenizer
from nanoengine.messages import Abort, AddRequest, Hello, Ready, TokenColumns, TokenDelta
from nanoengine.outbox import ClientDeltas

RATE_VARIABLE = "NANOENGINE_INSTANT_RATE"
_TEXT = "The quick brown fox jumps over the lazy dog. 中国的首都是北京。 Seventeen plus twenty-five is forty-two. "
_IDLE_MS = 200


@dataclasses.dataclass
class _Row:
    client_id: str
    num_left: int
    position: int = 0


class InstantEngine:
    """The rows of all open requests, and the socket to the front ends."""

    def __init__(self, bootstrap: Bootstrap, rate: float) -> None:
        tokenizer = load_tokenizer(bootstrap.config)
        assert tokenizer is not None, "the tokens are those of a text"
        self._tokens = tokenizer.encode(_TEXT)
        self._rate = rate
        self._config = bootstrap.config
        self._front = FrontSocket(bootstrap.front_address, bootstrap.incarnation)
        self._rows: dict[str, _Row] = {}

    def serve(self) -> None:
        """Run until SIGTERM, which raises SystemExit."""
        due = time.perf_counter()
        while True:
            wait_ms = max(0.0, due - time.perf_counter()) * 1000 if self._rows else _IDLE_MS
            self._front.socket.poll(int(wait_ms), zmq.POLLIN)
            self._receive()
            now = time.perf_counter()
            if self._rows and now >= due:
                self._step()
                due = max(due, now - 0.1) + len(self._rows) / self._rate
            elif not self._rows:
                due = now
            for client_id in self._front.flush():
                self._rows = {name: row for name, row in self._rows.items() if row.client_id != client_id}

    def _receive(self) -> None:
        for client_id, message in self._front.receive():
            if isinstance(message, Hello):
                block_size, max_model_len = self._config.cache.block_size, self._config.max_model_len
                self._front.send(
                    client_id, Ready(self._front.incarnation, 1, block_size, max_model_len, "none", "none")
                )
            elif isinstance(message, AddRequest):
                self._rows[message.request_id] = _Row(client_id, message.params["max_tokens"])
            elif isinstance(message, Abort):
                self._rows.pop(message.request_id, None)

    def _step(self) -> None:
        columns: dict[str, TokenColumns] = {}
        ended: list[tuple[str, TokenColumns | TokenDelta]] = []
        for name, row in self._rows.items():
            token = self._tokens[row.position % len(self._tokens)]
            if row.num_left == 1:
                ended.append((row.client_id, TokenDelta(name, 0, row.position, [token], "length")))
            else:
                column = columns.setdefault(row.client_id, TokenColumns([], [], [], 0, []))
                column.request_ids.append(name)
                column.indices.append(0)
                column.offsets.append(row.position)
                column.token_ids.append(token)
            row.position += 1
            row.num_left -= 1
        self._front.post(ClientDeltas([*columns.items(), *ended]))
        for _, delta in ended:
            assert isinstance(delta, TokenDelta)
            del self._rows[delta.request_id]


def main() -> None:
    """Process entry."""
    bootstrap = receive_bootstrap()
    engine = InstantEngine(bootstrap, float(os.environ[RATE_VARIABLE]))
    bootstrap.report_ready()
    with contextlib.suppress(KeyboardInterrupt):
        engine.serve()


if __name__ == "__main__":
    main()
