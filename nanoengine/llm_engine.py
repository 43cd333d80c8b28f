"""A local engine that is driven by its caller, without an event loop; knows neither progress bars nor who calls it."""

from __future__ import annotations

import logging
import math
import select
import time
import weakref
from collections.abc import Mapping
from typing import Any

from configs.engine import EngineConfig
from configs.errors import DeadlineError, EngineDeadError, RequestError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.connection import SchedulerConnection
from nanoengine.engine_client import EngineClient
from nanoengine.grammar_compiler import GrammarCompiler
from nanoengine.journal import CheckedRequest, RequestJournal
from nanoengine.prompts import Message, Prompt
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler_keeper import SchedulerKeeper
from nanoengine.structured_outputs import StructuredOutputsParams
from nanoengine.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# The engine reports ready before it is greeted, so its answer takes no longer than a first step might.
GREETING_TIMEOUT = 60.0
_WATCH_INTERVAL = 1.0


def load_tokenizer(config: EngineConfig) -> Tokenizer | None:
    """The tokenizer that a resolved config names; None under skip_tokenizer_init. Raises TokenizerError."""
    if config.model.skip_tokenizer_init:
        return None
    source = config.model.tokenizer or config.model_dir
    assert source is not None, "resolve() comes first"
    vocab_size = config.resolved_checkpoint.vocab_size
    return Tokenizer(source, config.model.tokenizer_mode, vocab_size, config.max_model_len)


class LLMEngine:
    """A scheduler process, the connection to it and the journals of the requests it serves.

    Belongs to one thread at a time. Does nothing between calls: tokens that arrive meanwhile wait in the socket, and
    so do the requests of a scheduler that was replaced.

    Raises whatever keeps the engine from starting: CheckpointError, TokenizerError, CapacityError, EngineDeadError …
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._keeper = SchedulerKeeper(config)
        self._grammars = GrammarCompiler(config)
        # Ends the process also when the engine is forgotten or the interpreter ends; `stop` is harmless twice.
        self._finalizer = weakref.finalize(self, self._keeper.stop)
        self._connection: SchedulerConnection | None = None
        self._incarnation = 0  # of the scheduler at its other end
        self._is_closed = False
        self._news: dict[RequestJournal, None] = {}  # an ordered set, until `wait` is asked for it
        try:
            self._keeper.start()
            self.tokenizer = load_tokenizer(config)  # while the workers load the model
            self._keeper.wait_ready(config.parallel.start_timeout + GREETING_TIMEOUT)
            self.client = EngineClient(config, self.tokenizer)
            self._greet(GREETING_TIMEOUT)
        except BaseException:  # Ctrl-C while loading included
            self.close()
            raise

    def check(self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None) -> CheckedRequest:
        """Check a request, encode its prompt and compile its grammar; nothing is sent. Raises RequestError."""
        wanted = params.structured_outputs if isinstance(params, SamplingParams) else None
        grammar = ""
        if isinstance(wanted, StructuredOutputsParams):
            self.client.check_alive()
            grammar = self._grammars.compile(wanted).result()
        return self.client.check(prompt, params, grammar)

    def submit(
        self,
        request: CheckedRequest,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RequestJournal:
        """Hand a checked request to the engine. Raises RequestError for anything but the prompt, EngineDeadError."""
        self._look()
        journal = self.client.add(request, request_id, priority, timeout)
        if self._connection is not None:
            self._connection.flush()
        return journal

    def render_chat(self, messages: list[Message], variables: Mapping[str, Any]) -> Prompt:
        """Turn a conversation into a prompt. Raises RequestError, e.g. where there is no template."""
        if self.tokenizer is None:
            raise RequestError(
                "chat needs a tokenizer, and the engine runs without one (skip_tokenizer_init)", "messages"
            )
        text = self.tokenizer.render_chat(messages, **variables)
        return Prompt(text, self.tokenizer.encode(text, add_special_tokens=False))

    def wait(self, timeout: float | None = None) -> list[RequestJournal]:
        """Return the requests that have news, each once, as soon as there are any.

        Candidates of which only the best will be shown (best_of, beam search) are no news until all have ended.
        Returns an empty list after `timeout` seconds (None: no limit), or when no request is open. When the engine
        dies, its open requests have news: they ended with an error.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self._pump()
            left = _WATCH_INTERVAL if deadline is None else deadline - time.monotonic()
            if self._news or left <= 0 or not self.client.num_unfinished or self._is_closed:
                news, self._news = list(self._news), {}
                return news
            self._await_something(min(left, _WATCH_INTERVAL))
            self._watch()

    def abort(self, request_id: str) -> None:
        """End a request, which is news. One that is not open is left alone."""
        journal = self.client.abort(request_id)
        self._tell([] if journal is None else [journal])
        if self._connection is not None:
            self._connection.flush()

    def reset_prefix_cache(self) -> None:
        """No later request hits what is cached now. Raises EngineDeadError."""
        self.client.reset_prefix_cache()
        if self._connection is not None:
            self._connection.flush()

    def open_request_ids(self) -> list[str]:
        """Ids of the requests that will still get tokens."""
        return self.client.open_request_ids()

    def close(self) -> None:
        """End the engine and what it serves. Harmless twice."""
        if self._connection is not None or self._incarnation:
            self._tell(self.client.fail(EngineDeadError("the engine was closed")))
        self._is_closed = True
        self._disconnect()
        self._grammars.close()
        self._keeper.stop()
        self._finalizer.detach()

    def _pump(self) -> None:
        if self._connection is not None:
            self._tell(self._connection.pump()[0])

    def _tell(self, journals: list[RequestJournal]) -> None:
        self._news |= dict.fromkeys(journal for journal in journals if journal.has_output)

    def _look(self) -> None:
        """Leave a scheduler that is gone, connect to the next, or end what is open when there will be none."""
        condition = self._keeper.look()
        if self._connection is not None and (not condition.serves or condition.incarnation != self._incarnation):
            self._pump()  # its last words
            self._disconnect()
            self.client.detach(condition)
        if condition.is_final and condition.cause is not None and self.client.failure is None:
            self._tell(self.client.fail(condition.cause))
        elif condition.serves and self._connection is None:
            self.client.attach(condition)
            self._connection = SchedulerConnection(condition.address, self.client)
            self._connection_finalizer = weakref.finalize(self, self._connection.close)
            self._incarnation = condition.incarnation
            self._connection.flush()

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection_finalizer()
        self._connection = None

    def _watch(self) -> None:
        self._look()
        self._tell(self.client.watch())
        if (error := self.client.hung) is not None:
            self._keeper.replace(self._incarnation, error)

    def _await_something(self, timeout: float) -> None:
        """Block for up to `timeout` seconds until something happened to the engine, or to its messages."""
        if self._connection is not None:
            self._connection.wait(timeout, self._keeper.fileno())
            return
        poller = select.poll()
        poller.register(self._keeper.fileno(), select.POLLIN)
        poller.poll(math.ceil(timeout * 1000))

    def _greet(self, timeout: float) -> None:
        """Wait until the scheduler has told what it learnt while starting."""
        deadline = time.monotonic() + timeout
        while True:
            self._look()
            self._pump()
            if self.client.facts is not None:
                return
            self.client.check_alive()
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineError(f"the scheduler did not answer a greeting within {timeout:g} s")
            self._await_something(min(left, _WATCH_INTERVAL))
