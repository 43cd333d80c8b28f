"""Generating text on an event loop, many requests at once; knows neither HTTP nor how a token is computed.

A stream has no queue: its consumer is woken up and takes a snapshot of the journal. So a slow consumer costs
nothing and misses nothing, it only sees several tokens at a time.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from types import TracebackType
from typing import Any

from configs.engine import EngineConfig
from configs.errors import ConfigError, DeadlineError, EngineDeadError, EngineError, NanoEngineError
from nanoengine.async_link import AsyncLink
from nanoengine.beam_params import BeamSearchParams
from nanoengine.engine_client import EngineClient
from nanoengine.engine_status import EngineStatus, SchedulerRestartStats
from nanoengine.engine_view import EngineView
from nanoengine.grammar_compiler import GrammarCompiler
from nanoengine.journal import RequestJournal
from nanoengine.llm_engine import GREETING_TIMEOUT, load_tokenizer
from nanoengine.messages import AbortNamed, Ready, StateRequest, Stats
from nanoengine.outputs import RequestOutput
from nanoengine.prompts import Prompt, PromptInput, check_beam_params, check_params, parse_prompt
from nanoengine.recorder import RequestRecorder
from nanoengine.sampling_params import SamplingParams
from nanoengine.scheduler_keeper import SchedulerKeeper
from nanoengine.structured_outputs import StructuredOutputsParams
from nanoengine.tokenizer import Tokenizer
from nanoengine.watched import vital, watch

# Longer texts are encoded in a thread: this much takes about a millisecond.
LONG_TEXT_CHARS = 4096
_WATCH_INTERVAL = 1.0
# Streams that are woken up before the event loop turns to anything else: a millisecond or two.
WAKE_BATCH = 16
# The scheduler is asked for its state at most this often, however many watch, and has so long to answer.
STATE_INTERVAL = 0.25
STATE_TIMEOUT = 5.0


class AsyncLLM:
    """A model that answers many prompts at once, in processes of its own. Belongs to the event loop that starts it.

        async with AsyncLLM("demo") as llm:
            async for output in llm.generate("中国的首都是", SamplingParams(temperature=0)):
                print(output.outputs[0].text)

    Args:
        model: a name in the registry, or a model directory.
        config: all settings at once, instead of `model` and `settings`; resolved if it is not.
        engine: one that another process owns (one of several front ends has it so); by default its own.
        settings: the options of the command line with underscores.

    Raises:
        ConfigError, UnknownModelError, CheckpointError: a setting or the model cannot be used.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        engine: EngineStatus | None = None,
        **settings: Any,
    ) -> None:
        if config is not None and (model is not None or settings):
            raise ConfigError("give either config or model and settings, not both", "config")
        if config is None:
            config = EngineConfig.create(**({} if model is None else {"model": model}), **settings)
        self._config = config if config.checkpoint is not None else config.resolve()
        self._engine = SchedulerKeeper(self._config) if engine is None else engine
        self._is_shared = engine is not None
        self._grammars = GrammarCompiler(self._config)
        # Ends the engine also when nobody closes: on the interpreter's end, or when this object is forgotten.
        self._finalizer = weakref.finalize(self, self._engine.stop)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._starting: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._tokenizer: Tokenizer | None = None
        self._client: EngineClient | None = None
        self._link: AsyncLink | None = None
        self._start_failure: NanoEngineError | None = None
        self._news: dict[RequestJournal, asyncio.Event] = {}  # of each request that somebody reads
        self._to_wake: dict[RequestJournal, None] = {}  # those whose news were not told of yet, in order
        self._watchdog: asyncio.TimerHandle | None = None
        self._view: asyncio.Task[EngineView] | None = None  # the latest, or the one that is coming
        self._state_news = asyncio.Event()  # set whenever there may be a new one
        self.recorder: RequestRecorder | None = None  # is told of each request's life; set it before the start

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def config(self) -> EngineConfig:
        """The resolved settings."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None under skip_tokenizer_init, and before `start` has returned."""
        return self._tokenizer

    @property
    def facts(self) -> Ready | None:
        """What the engine learnt while it started (K/V blocks, dtype, device); None before it is ready."""
        return None if self._client is None else self._client.facts

    @property
    def stats(self) -> Stats | None:
        """The engine's latest statistics, about a second old while it works; None before it is ready."""
        return None if self._client is None else self._client.stats

    @property
    def is_ready(self) -> bool:
        """Whether requests are served right now. Reads state only, so that a probe queues no work."""
        return self.facts is not None and self.failure is None and self.recovering_from is None

    @property
    def recovering_from(self) -> NanoEngineError | None:
        """Why streams pause while ranks, or the scheduler, are replaced; else None. Requests that come now wait."""
        return None if self._client is None else self._client.recovering_from

    @property
    def failure(self) -> NanoEngineError | None:
        """Why no request will be served any more, `close` included; None while there is hope."""
        if self._start_failure is not None:
            return self._start_failure
        return None if self._client is None else self._client.failure

    @property
    def restart_stats(self) -> SchedulerRestartStats:
        """How often the scheduler was replaced, and how long that took."""
        return SchedulerRestartStats() if self._client is None else self._client.restart_stats

    @property
    def num_unfinished(self) -> int:
        """Requests that will still get tokens."""
        return 0 if self._client is None else self._client.num_unfinished

    @property
    def num_queued(self) -> int:
        """Those of them that wait for their first token."""
        return 0 if self._client is None else self._client.num_queued

    @property
    def run_dir(self) -> Path:
        """The engine's private directory, which all of its front ends share; known once it is starting."""
        return self._engine.run_dir

    # -- start and end ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine and return when it serves; the event loop goes on meanwhile. Harmless twice.

        `generate` does it too. Cancelling one of several callers does not stop the start.

        Raises whatever keeps the engine from starting: CheckpointError, TokenizerError, CapacityError …
        """
        loop = asyncio.get_running_loop()
        if self.failure is not None:
            raise copy.copy(self.failure) from self.failure.__cause__
        if self._loop is not None and self._loop is not loop:
            raise EngineError("an AsyncLLM belongs to the event loop that started it, and this is another one")
        if self._starting is None:
            self._loop = loop
            self._starting = loop.create_task(self._start(loop))
            self._starting.add_done_callback(_retrieve)
        if self._starting.done() and not self._starting.cancelled():
            return
        await asyncio.shield(self._starting)

    async def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._engine.start()
            timeout = self._config.parallel.start_timeout + GREETING_TIMEOUT
            ready = asyncio.to_thread(self._engine.wait_ready, timeout)
            tokenizer = asyncio.to_thread(load_tokenizer, self._config)  # while the workers load the model
            self._tokenizer, _ = await asyncio.gather(tokenizer, ready)
            self._client = EngineClient(self._config, self._tokenizer, recorder=self.recorder)
            self._link = AsyncLink(self._engine, self._client, self._on_news, self.break_down)
            await self._link.greet(GREETING_TIMEOUT)
        except BaseException as error:
            if not isinstance(error, NanoEngineError):
                self._start_failure = EngineDeadError(f"the start was broken off: {error!r}")
            else:
                self._start_failure = error
            await self._release()
            raise

    async def close(self) -> None:
        """End the engine; open streams end with an error. Harmless twice, and while it is still starting."""
        if self._loop is not None and self._loop.is_closed():
            self._loop = None  # with it went its tasks and readers; the rest is given back from here
        elif self._loop is not None and self._loop is not asyncio.get_running_loop():
            raise EngineError("an AsyncLLM is closed on the event loop that started it, and this is another one")
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
            watch(self._closing, "the end of the engine")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        if self._loop is not None and self._starting is not None and not self._starting.done():
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._client is None:
            self._start_failure = self._start_failure or EngineDeadError("the engine was closed")
        else:
            self._wake(self._client.fail(EngineDeadError("the engine was closed")))
        await self._release()

    async def _release(self) -> None:
        """Give back the socket and the process, without blocking the event loop."""
        if self._watchdog is not None:
            self._watchdog.cancel()
        link, self._link = self._link, None
        if link is not None:
            link.close()
        await asyncio.to_thread(self._grammars.close)
        await asyncio.to_thread(self._engine.stop)
        self._finalizer.detach()

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    # -- requests -----------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one prompt: yields everything generated so far whenever there is more, the last time with `finished`.

        Under `n` above 1 an output holds all sequences, in the order of their indexes. Under `best_of` above `n` there
        is one output only, the last: which candidates are the best is not known before.

        Leaving the iteration early, by `break`, by `aclose` or by cancellation, aborts the request. What fails
        before the first output is raised; what fails later ends the stream with finish_reason "error" and the
        reason in `outputs[0].error`.

        Args:
            priority: under the policy `priority`, the lower is served the sooner.
            timeout: seconds after which the request ends with an error; `request_timeout` is an upper bound.

        Raises:
            RequestError: the request cannot be served as it stands.
            QueueFullError: too many requests wait already.
            RequestTimeoutError: its time was over before its first token.
            EngineError: the engine is gone, or does not start.
        """
        return self._answer(prompt, check_params(sampling_params), request_id, priority, timeout)

    def beam_search(
        self,
        prompt: PromptInput,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Search the best sequences that follow one prompt; yields one output, which holds them all, the best first.

        Otherwise like `generate`.
        """
        return self._answer(prompt, check_beam_params(params), request_id, priority, timeout)

    async def _answer(
        self,
        prompt: PromptInput,
        params: SamplingParams | BeamSearchParams | None,
        request_id: str | None,
        priority: int,
        timeout: float | None,  # noqa: ASYNC109 - the scheduler keeps it
    ) -> AsyncGenerator[RequestOutput, None]:
        await self.start()
        assert self._client is not None
        self._client.check_queue()
        parsed = await self._encode(parse_prompt(prompt))
        checked = self._client.check(parsed, params, await self._compile(params))
        journal = self._client.add(checked, request_id, priority, timeout)
        news = self._news[journal] = asyncio.Event()
        self._start_watchdog()
        self._send()
        is_first = True
        try:
            while True:
                await news.wait()
                news.clear()
                if journal.failure is not None and is_first:
                    # A copy, because an exception gathers the traceback of everybody who raises it.
                    raise copy.copy(journal.failure) from journal.failure.__cause__
                finished = journal.finished
                if journal.has_output:
                    is_first = False
                    yield journal.output()
                if finished:
                    return
        finally:
            del self._news[journal]
            if not journal.finished:
                self._client.abort(journal.request_id)
                self._send()

    async def abort(self, request_id: str) -> None:
        """End a request; its stream ends with finish_reason "abort". Harmless when there is no such request."""
        journal = None if self._client is None else self._client.abort(request_id)
        if journal is not None:
            self._wake([journal])
            self._send()

    async def abort_named(self, names: list[str] | None) -> list[str]:
        """End the requests of these ids, or of HTTP requests of these ids; None: all. Unknown ones are no error.

        Returns the ids of those that were open here. Other front ends of the same engine end theirs as well, soon.
        """
        if self._client is None:
            return []
        message = AbortNamed(names)
        journals = self._client.abort_named(message)
        if self._is_shared and self._client.failure is None:
            self._client.outbox.append(message)
        self._wake(journals)
        self._send()
        return [journal.request_id for journal in journals]

    def check_queue(self, num_requests: int = 1) -> None:
        """Raise QueueFullError when so many more requests cannot be queued now; before anything is tokenised."""
        if self._client is not None:
            self._client.check_queue(num_requests)

    async def reset_prefix_cache(self) -> None:
        """No later request is answered from prefixes that are cached now. Raises EngineError when it is gone."""
        await self.start()
        assert self._client is not None
        self._client.reset_prefix_cache()
        self._send()

    # -- a look at the engine -----------------------------------------------------------------------------------

    async def engine_view(self) -> EngineView:
        """What goes on in the engine: who runs and waits, what lies in the K/V blocks, how long requests take.

        Several who ask at once share one answer, which may be STATE_INTERVAL old.

        Raises:
            EngineError: the engine is gone, does not start, or does not answer.
        """
        await self.start()
        loop = asyncio.get_running_loop()
        if self._view is None or (self._view.done() and not self._is_recent(self._view)):
            self._view = loop.create_task(self._look())
            self._view.add_done_callback(_retrieve)
        return await asyncio.shield(self._view)

    def _is_recent(self, view: asyncio.Task[EngineView]) -> bool:
        failed = view.cancelled() or view.exception() is not None
        return not failed and 0 <= time.time() - view.result().state.time < STATE_INTERVAL

    async def _look(self) -> EngineView:
        assert self._client is not None
        self._client.check_alive()
        observer = self._client.observer
        observer.state = None
        self._state_news.clear()
        self._client.outbox.append(StateRequest())
        self._send()
        try:
            async with asyncio.timeout(STATE_TIMEOUT):
                while observer.state is None:
                    await self._state_news.wait()
                    self._state_news.clear()
                    self._client.check_alive()
        except TimeoutError:
            raise DeadlineError(f"the scheduler did not tell its state within {STATE_TIMEOUT:g} s") from None
        return EngineView(observer.state, observer.latencies())

    async def _encode(self, prompt: Prompt) -> Prompt:
        assert self._client is not None
        if prompt.token_ids is None and prompt.text is not None and len(prompt.text) > LONG_TEXT_CHARS:
            return await asyncio.to_thread(self._client.encode, prompt)
        return prompt

    async def _compile(self, params: SamplingParams | BeamSearchParams | None) -> str:
        wanted = getattr(params, "structured_outputs", None)
        if not isinstance(wanted, StructuredOutputsParams):
            return ""
        # Shielded: others may wait for the same grammar.
        return await asyncio.shield(asyncio.wrap_future(self._grammars.compile(wanted)))

    # -- what wakes up the event loop ---------------------------------------------------------------------------

    def _send(self) -> None:
        """Something may be in the client's outbox."""
        if self._link is not None:
            self._link.pump()

    def _on_news(self, journals: list[RequestJournal]) -> None:
        self._wake(journals)
        if self._client is not None and self._client.is_waiting:
            self._start_watchdog()

    def _wake(self, journals: list[RequestJournal]) -> None:
        """Let whoever reads these requests see their news, soon.

        Some at a time: each one renders and sends what is new, and those of a whole step together would keep probes,
        new requests and the scheduler's next messages waiting.
        """
        self._state_news.set()
        is_waking = bool(self._to_wake)
        self._to_wake |= dict.fromkeys(journals)
        if not is_waking:
            self._wake_some()

    @vital
    def _wake_some(self) -> None:
        for journal in list(itertools.islice(self._to_wake, WAKE_BATCH)):
            del self._to_wake[journal]
            news = self._news.get(journal)
            if news is not None:
                news.set()
        if self._to_wake:
            asyncio.get_running_loop().call_soon(self._wake_some)

    def _start_watchdog(self) -> None:
        if self._watchdog is None and self._loop is not None:
            self._watchdog = self._loop.call_later(_WATCH_INTERVAL, self._watch)

    @vital
    def _watch(self) -> None:
        """Runs while something is due from the scheduler; an idle engine keeps no timer."""
        self._watchdog = None
        if self._link is not None:
            self._link.watch()

    def break_down(self, error: BaseException) -> None:
        """Something failed that no stream goes on without: all of them end with an error, as if the engine died."""
        try:
            if self._client is not None:
                self._client.fail(EngineError(f"the front end failed: {type(error).__name__}: {error}"))
        finally:
            if self._link is not None:
                self._link.close()  # or it would be called again and again; the scheduler ends what is open
            for news in (self._state_news, *self._news.values()):
                news.set()


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Look at the failure of a task that perhaps nobody waits for: asyncio complains about errors nobody has seen."""
    if not task.cancelled():
        task.exception()
