"""What the HTTP server asks of an engine; `nanoengine.AsyncLLM` is the one that has it, tests have others."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from configs.engine import EngineConfig
from configs.errors import NanoEngineError
from nanoengine.beam_params import BeamSearchParams
from nanoengine.engine_status import SchedulerRestartStats
from nanoengine.engine_view import EngineView
from nanoengine.messages import Stats
from nanoengine.outputs import RequestOutput
from nanoengine.prompts import PromptInput
from nanoengine.recorder import RequestRecorder
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer


class Engine(Protocol):
    """See `nanoengine.async_llm.AsyncLLM`."""

    recorder: RequestRecorder | None

    @property
    def config(self) -> EngineConfig: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def stats(self) -> Stats | None: ...
    @property
    def restart_stats(self) -> SchedulerRestartStats: ...
    @property
    def is_ready(self) -> bool: ...
    @property
    def recovering_from(self) -> NanoEngineError | None: ...
    @property
    def failure(self) -> NanoEngineError | None: ...
    @property
    def num_unfinished(self) -> int: ...
    @property
    def num_queued(self) -> int: ...
    def generate(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...
    def beam_search(
        self,
        prompt: PromptInput,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncGenerator[RequestOutput, None]: ...
    def check_queue(self, num_requests: int = 1) -> None: ...
    async def abort_named(self, names: list[str] | None) -> list[str]: ...
    async def reset_prefix_cache(self) -> None: ...
    async def engine_view(self) -> EngineView: ...
