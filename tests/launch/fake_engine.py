"""An engine without processes for the HTTP server: it checks requests as the real one does, and invents the answers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from configs.engine import EngineConfig
from configs.errors import EngineError, NanoEngineError, QueueFullError
from launch.front_dir import FrontDir
from launch.server.app import create_app
from launch.server.protocol import BoundedProtocol
from nanoengine.beam_params import BeamSearchParams
from nanoengine.detokenizer import IncrementalDetokenizer, StopChecker
from nanoengine.engine_client import EngineClient
from nanoengine.engine_status import SchedulerRestartStats
from nanoengine.engine_view import EngineView, Latencies, Percentiles
from nanoengine.messages import BlockMap, EngineState, SequenceRow, SharedPrefix, Stats
from nanoengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.prompts import PromptInput, parse_prompt
from nanoengine.recorder import RequestRecorder
from nanoengine.sampling_params import SamplingParams
from nanoengine.structured_outputs import StructuredOutputsParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.tokenizers_for_tests import write_byte_level
from tests.waiting import until

ANSWER = "北京 is the capital 😀."
MAX_MODEL_LEN = 256


class FakeEngine:
    """Answers `answer` token by token, or what `answers` holds for a prompt's text. `template` is its chat template.

    While `script` holds something, the first of it is the answer from the next request on.

    `delay` seconds lie between tokens; `fail_after` tokens the request fails; `open` and `aborted` hold request ids.
    No request gets more than `held_after` tokens until that is None: none ends meanwhile, however long a test takes.
    """

    def __init__(
        self,
        folder: Path,
        template: str | None = None,
        tokenizer_config: Mapping[str, object] | None = None,
        **settings: Any,
    ) -> None:
        config = dict(tokenizer_config or {}) | ({} if template is None else {"chat_template": template})
        self.tokenizer: Tokenizer | None = Tokenizer(write_byte_level(folder / "tokenizer", **config))
        self.answer = ANSWER
        self.script: list[str] = []
        settings = {"max_model_len": MAX_MODEL_LEN} | settings
        self.config = EngineConfig.create(**settings).resolve()
        self.is_ready = True
        self.failure: NanoEngineError | None = None
        self.recovering_from: NanoEngineError | None = None
        self.delay = 0.0
        self.fail_after: int | None = None
        self.held_after: int | None = None
        self.raise_at_once: Exception | None = None
        self.answer = ANSWER
        self.answers: dict[str, str] = {}
        self.open: set[str] = set()
        self.aborted: list[str] = []
        self.params: list[SamplingParams] = []
        self.beams: list[BeamSearchParams] = []
        self.prompts: list[list[int]] = []
        self.salts: list[str] = []
        self.scheduling: list[dict[str, Any]] = []
        self.queue_is_full = False
        self.failure_kind: str | None = None
        self.num_resets = 0
        self.num_views = 0
        self.stats: Stats | None = None
        self.restart_stats = SchedulerRestartStats()
        self.recorder: RequestRecorder | None = None

    async def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **scheduling: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        form = None if sampling_params is None else sampling_params.structured_outputs
        grammar = form.to_grammar() if isinstance(form, StructuredOutputsParams) else ""
        request = EngineClient(self.config, self.tokenizer).check(parse_prompt(prompt), sampling_params, grammar)
        prompt = request.prompt_token_ids
        self.salts.append(request.cache_salt)
        self.scheduling.append(scheduling)
        if self.script:
            self.answer = self.script.pop(0)
        if self.raise_at_once is not None:
            raise self.raise_at_once
        assert request_id is not None
        self.params.append(request.params)
        self.prompts.append(prompt)
        self.open.add(request_id)
        finished = False
        try:
            for number, output in enumerate(self._told(prompt, request.params, request_id, request.max_tokens)):
                await asyncio.sleep(self.delay)
                while self.held_after is not None and number >= self.held_after:  # noqa: ASYNC110  # another thread's
                    await asyncio.sleep(0.002)
                finished = output.finished
                yield output
        finally:
            self.open.discard(request_id)
            if not finished:
                self.aborted.append(request_id)

    @property
    def num_unfinished(self) -> int:
        return len(self.open)

    @property
    def num_queued(self) -> int:
        return 0

    async def beam_search(
        self, prompt: PromptInput, params: BeamSearchParams, request_id: str | None = None, **scheduling: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As many sequences as it is wide, told at the end."""
        self.beams.append(params)
        async with contextlib.aclosing(
            self.generate(prompt, params.sampling_params(), request_id, **scheduling)
        ) as outputs:
            async for output in outputs:
                if output.finished:
                    yield output

    def check_queue(self, num_requests: int = 1) -> None:
        if self.queue_is_full:
            raise QueueFullError(f"no room for {num_requests}")

    async def abort_named(self, names: list[str] | None) -> list[str]:
        return sorted(each for each in self.open if names is None or each in names)

    async def reset_prefix_cache(self) -> None:
        self.num_resets += 1

    async def engine_view(self) -> EngineView:
        """A device of 6 blocks, two of them shared by the open requests, and a host tier of 4."""
        self.num_views += 1
        state = EngineState(
            incarnation=1,
            time=time.time(),
            num_running=len(self.open),
            num_waiting=2,
            num_swapped=1,
            num_preemptions=0,
            num_generated_tokens=100 * self.num_views,
            num_query_tokens=40,
            num_hit_tokens=10,
            device=BlockMap(6, 6, 1, 1, 1, 2, b"\xff" + bytes(5), b"\0\xff" + bytes(4), b"\0\0\xff\xff\0\0"),
            host=BlockMap(4, 4, 1, 1, 1, 0, b"\xff\0\0\0", b"\0\xff\0\0", bytes(4)),
            prefixes=[SharedPrefix(2, 3, 2, 4)],
            prefix_cells=b"\0\0\1\1\0\0",
            rows=[SequenceRow(f"{each}.0", 0, "running", 8, 8, 2, 3, 2, 0, 1.5) for each in sorted(self.open)],
        )
        return EngineView(state, Latencies(Percentiles(3, 0.05, 0.12), Percentiles(0, None, None)))

    def _told(
        self, prompt: list[int], params: SamplingParams, request_id: str, max_tokens: int
    ) -> Iterator[RequestOutput]:
        """All outputs; where the prompt is told of, half of it comes before the first token."""
        if params.prompt_logprobs is None:
            yield from self._outputs(request_id, prompt, params, max_tokens)
            return
        number = params.prompt_logprobs
        entries = [None, *(self._logprobs(token, number) for token in prompt[1:])]
        nothing = [CompletionOutput(index, "", []) for index in range(params.n)]
        half = entries[: 1 + len(entries) // 2]
        yield RequestOutput(request_id, None, prompt, nothing, False, RequestMetrics(time.time()), half)
        for output in self._outputs(request_id, prompt, params, max_tokens):
            output.prompt_logprobs = entries
            yield output

    def _outputs(
        self, request_id: str, prompt: list[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[RequestOutput]:
        """All sequences advance by a token at a time. The best of several candidates are those of the highest index."""
        streams = [self._sequence(index, prompt, params, max_tokens) for index in range(params.num_sequences)]
        latest = [CompletionOutput(index, "", []) for index in range(params.num_sequences)]
        while not any(each.error for each in latest) and not all(each.finished for each in latest):
            latest = [last if last.finished else next(streams[index]) for index, last in enumerate(latest)]
            finished = all(each.finished for each in latest) or any(each.error for each in latest)
            shown = latest
            if params.ranks_candidates:
                if not finished:
                    continue
                best = latest[::-1][: params.n]
                shown = [dataclasses.replace(each, index=place) for place, each in enumerate(best)]
            metrics = RequestMetrics(time.time(), num_cached_tokens=1)
            metrics.num_completion_tokens = sum(len(each.token_ids) for each in latest)
            yield RequestOutput(request_id, None, prompt, list(shown), finished, metrics)

    def _sequence(
        self, index: int, prompt: list[int], params: SamplingParams, max_tokens: int
    ) -> Iterator[CompletionOutput]:
        """What sequence `index` is after each token; its answer ends in its index, but for the first."""
        assert self.tokenizer is not None
        text = self.answers.get(self.tokenizer.decode(prompt), self.answer) + (f" {index}" if index else "")
        ids = [*self.tokenizer.encode(text), self.tokenizer.eos_token_id or 0]
        stream, stops, text = (
            IncrementalDetokenizer(self.tokenizer, prompt, params.skip_special_tokens),
            StopChecker(params.stop),
            "",
        )
        for count in range(1, len(ids) + 1):
            if count - 1 == self.fail_after:
                yield CompletionOutput(
                    index, text, ids[: count - 1], finish_reason="error", error="rank 1 fell over",
                    error_kind=self.failure_kind,
                )  # fmt: skip
                return
            new, matched = stops.feed(stream.append(ids[count - 1 : count] if count < len(ids) else []))
            text += new
            reason = "stop" if matched or count == len(ids) else "length" if count == max_tokens else None
            if reason and not matched:
                text += stops.feed(stream.finish())[0] + stops.flush()
            output = CompletionOutput(index, text, ids[:count], finish_reason=reason, stop_reason=matched)
            if params.logprobs is not None:
                output.logprobs = [self._logprobs(token, params.logprobs) for token in ids[:count]]
            yield output
            if reason:
                return

    def _logprobs(self, token: int, number: int) -> dict[int, Logprob]:
        """The token itself comes third, so that it is told beside one or two likelier ones."""
        assert self.tokenizer is not None
        text, others = self.tokenizer.token_text, [each for each in range(100, 125) if each != token]
        ranked = [*others[:2], token, *others[2:]]
        top = {each: Logprob(-float(rank), rank, text(each)) for rank, each in enumerate(ranked[:number], start=1)}
        return {token: Logprob(-3.0, 3, text(token))} | top


@contextlib.contextmanager
def served(engine: FakeEngine, front_dir: FrontDir | None = None) -> Iterator[str]:
    """The address of a real uvicorn server over the engine, in a thread; as one of several front ends if asked for."""
    listener = socket.create_server(("127.0.0.1", 0))
    listeners = [listener] if front_dir is None else [listener, front_dir.listen()]
    app = create_app(engine, front_dir=front_dir)
    settings = uvicorn.Config(app, http=BoundedProtocol, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": listeners})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        for each in listeners:
            each.close()


def engine_error(message: str) -> EngineError:
    return EngineError(message)
