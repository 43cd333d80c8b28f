"""A whole engine and its front end in the calling thread, turn by turn: the real loop, sockets, journals and model.

What a test injects into it happens where the test stands. Only processes and the event loop are missing. Its clock goes
by turns: the same requests execute the same lines each time, however busy the machine is.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from pathlib import Path
from typing import Any
from unittest import mock

from configs.engine import EngineConfig
from nanoengine import SamplingParams
from nanoengine.beam_params import BeamSearchParams
from nanoengine.connection import SchedulerConnection
from nanoengine.engine import EngineCore
from nanoengine.engine_client import EngineClient
from nanoengine.executor import Executor, MultiprocessExecutor, create_executor
from nanoengine.front_socket import FrontSocket
from nanoengine.journal import RequestJournal
from nanoengine.llm_engine import load_tokenizer
from nanoengine.prompts import Prompt
from nanoengine.step import Epoch
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.fault_injection import untraced

IDLE_MS = 5
Params = SamplingParams | BeamSearchParams
_names = itertools.count()


class _Clock:
    """Stands for the module `time` in the engine's loop: a turn takes ten milliseconds, which is more than it does."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


class EngineInStep:
    """`add` requests, then `run` until all have ended. The scheduler's invariants are checked in every turn."""

    def __init__(self, run_dir: Path, entry: str = "", **settings: Any) -> None:
        """`entry` names what runs in the ranks' processes; without it they are no processes."""
        self._clock, self._patches = _Clock(), contextlib.ExitStack()
        self._patches.enter_context(mock.patch("nanoengine.engine.time", self._clock))
        self._patches.enter_context(mock.patch("nanoengine.connection.MAX_SECONDS", math.inf))
        asked = {"device": "cpu"} | ({} if entry else {"executor": "inprocess"}) | settings
        self.config = EngineConfig.create(**asked).resolve()
        if entry:
            self.executor: Executor = MultiprocessExecutor(self.config, run_dir, entry=entry)
        else:
            self.executor = create_executor(self.config, run_dir)
        epoch = Epoch(1, 1)
        address = f"inproc://engine-in-step-{next(_names)}"
        self.front = FrontSocket(address, 1)
        self.core = EngineCore(self.config, self.executor, self.front, self.executor.start(epoch), epoch)
        self.client = EngineClient(self.config, load_tokenizer(self.config))
        self.connection = SchedulerConnection(address, self.client)
        self.client.hello()
        while self.client.facts is None:
            self.turn()

    def add(self, prompt: Prompt, params: Params) -> RequestJournal:
        """Open a request as a front end does, its structured outputs compiled."""
        form = params.structured_outputs if isinstance(params, SamplingParams) else None
        grammar = form.to_grammar() if isinstance(form, StructuredOutputsParams) else ""
        return self.client.add(self.client.check(prompt, params, grammar))

    def turn(self) -> None:
        """Let the front end send and receive, and the scheduler's loop go round once."""
        self._clock.now += 0.01
        self.connection.pump()
        self.core._poller.poll(IDLE_MS)
        self.core._turn()
        self.connection.pump()
        with untraced():
            self.core.scheduler.check_invariants()

    def run(self, requests: list[tuple[Prompt, Params]]) -> list[Any]:
        """All that the clients of these requests are told in the end, in their order."""
        return self.finish([self.add(*request) for request in requests])

    def finish(self, journals: list[RequestJournal], max_turns: int = 20_000) -> list[Any]:
        """Go round until these requests have ended; returns what their clients are told."""
        for _ in range(max_turns):
            with untraced():
                if all(journal.finished for journal in journals):
                    return [told(journal) for journal in journals]
            self.turn()
        raise AssertionError(f"not all requests came to an end: {[told(journal) for journal in journals]}")

    def settle(self, max_turns: int = 20_000) -> None:
        """Let the last steps return, and check that nothing of any request is left."""
        for _ in range(max_turns):
            scheduler = self.core.scheduler
            if not scheduler.requests and not self.executor.num_in_flight and not scheduler.dropped:
                break
            self.turn()
        assert not scheduler.requests, f"requests that no client waits for: {list(scheduler.requests)}"
        assert scheduler.blocks.num_free_blocks == scheduler.limits.num_kv_blocks, "a block leaked"
        assert scheduler.blocks.host.num_free_blocks == scheduler.limits.num_host_blocks, "a host block leaked"
        assert not self.client.num_unfinished

    def close(self) -> None:
        self._patches.close()
        self.connection.close()
        self.front.close()
        self.executor.stop()


def told(journal: RequestJournal) -> list[Any]:
    """What a client may see of an answer, but for times."""
    output = journal.output()
    outputs = [(o.index, o.text, list(o.token_ids), o.finish_reason, o.logprobs, o.error) for o in output.outputs]
    return [output.prompt_logprobs, output.finished, outputs]
