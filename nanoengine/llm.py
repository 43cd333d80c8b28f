"""Generating text from one's own program; knows neither how a request reaches an engine nor how it is computed.

`LLM` is the blocking client, `AsyncLLM` (in `nanoengine.async_llm`) the one for an event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

from configs.engine import EngineConfig
from configs.errors import ConfigError, EngineDeadError, EngineError, RequestError
from nanoengine.async_llm import AsyncLLM
from nanoengine.beam_params import BeamSearchParams
from nanoengine.llm_engine import LLMEngine
from nanoengine.outputs import RequestOutput
from nanoengine.progress import Counted, Progress
from nanoengine.prompts import (
    Message,
    Prompt,
    PromptInput,
    at_index,
    check_beam_params,
    check_params,
    pair_params,
    parse_conversations,
    parse_prompt,
    parse_prompts,
)
from nanoengine.remote import RemoteEngine
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer

__all__ = ["LLM", "AsyncLLM"]

DEFAULT_MODEL = "demo"


class _Request(Counted, Protocol):
    """A request on its way, local or remote."""

    @property
    def request_id(self) -> str: ...
    def output(self) -> RequestOutput: ...


class _Engine(Protocol):
    """What `LLM` asks of an engine; `nanoengine.llm_engine.LLMEngine` documents it."""

    @property
    def tokenizer(self) -> Tokenizer | None: ...
    def check(self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None, /) -> Any: ...
    def submit(
        self, request: Any, request_id: str | None = None, *, priority: int = 0, timeout: float | None = None
    ) -> _Request: ...
    def render_chat(self, messages: list[Message], variables: dict[str, Any], /) -> Prompt: ...
    def wait(self, timeout: float | None = None) -> Sequence[_Request]: ...
    def abort(self, request_id: str) -> None: ...
    def open_request_ids(self) -> list[str]: ...
    def reset_prefix_cache(self) -> None: ...
    def close(self) -> None: ...


class LLM:
    """A model that answers prompts, in processes of its own or behind a running server.

    Works from scripts without a main guard, from notebooks and from standard input. Several can live in one
    program. One thread at a time may use it. It ends with `close`, with its `with` block, when it is forgotten, or
    with the program.

        with LLM("demo") as llm:
            print(llm.generate("中国的首都是", SamplingParams(temperature=0), use_tqdm=False)[0].outputs[0].text)

    Args:
        model: a name in the registry, or a model directory. With `base_url`: the name there; the default stands for
            the first model that the server has.
        base_url: address of a running server, e.g. http://127.0.0.1:8000; no process is started then.
        api_key: the key that server wants.
        settings: the options of the command line with underscores, e.g. tensor_parallel_size=2.

    Raises:
        ConfigError, UnknownModelError, CheckpointError, TokenizerError, CapacityError: a setting or the model cannot
            be used.
        EngineError: the engine, or the server, does not answer.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        **settings: Any,
    ) -> None:
        self._pending: dict[str, _Request] = {}  # news of requests that were added with add_request
        self._added: set[str] = set()
        self._engine: _Engine
        if base_url is None:
            if api_key:  # the settings' default, no keys, may come along
                raise ConfigError("api_key belongs to a running server: give base_url too", "api_key")
            self._engine = LLMEngine(EngineConfig.create(model=model, **settings).resolve())
            return
        if settings:
            name = sorted(settings)[0]
            raise ConfigError(f"{name} is a setting of the server at {base_url}; it cannot be set from here", name)
        self._engine = RemoteEngine(base_url, api_key, None if model == DEFAULT_MODEL else model)

    # -- many prompts at once -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts; the outputs come in the order of the prompts, each with `n` sequences.

        A prompt is text, a list of token ids, or a dict of either; a list of ints is one prompt. A request that
        fails while it runs comes back with finish_reason "error" and the reason in `outputs[0].error`, and does not
        disturb the others. Interrupted (Ctrl-C), the outstanding requests are aborted and the engine stays usable.

        Args:
            sampling_params: one for all prompts, or one for each; None takes the checkpoint's defaults.
            use_tqdm: show a progress bar.
            priority: one for all prompts, or one for each; under the policy `priority` the lower is served the sooner,
                and None is 0.
            timeout: seconds after which a request that is not complete ends with an error.

        Raises:
            RequestError: a prompt or its parameters cannot be served; it names the prompt's index, and none is
                submitted.
            EngineDeadError: the engine was gone before this call.
        """
        parsed = parse_prompts(prompts)
        options = _options(priority, timeout, len(parsed))
        return self._run(parsed, pair_params(sampling_params, len(parsed)), use_tqdm, options)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
        priority: int | Sequence[int] | None = None,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (a list of messages with role and content), or a list of conversations.

        Otherwise like `generate`. `chat_template_kwargs` are further variables of the model's chat template.
        """
        variables = {**(chat_template_kwargs or {}), "add_generation_prompt": add_generation_prompt}
        conversations = parse_conversations(messages)
        prompts = _each(conversations, lambda index: self._engine.render_chat(conversations[index], variables))
        options = _options(priority, timeout, len(prompts))
        return self._run(prompts, pair_params(sampling_params, len(prompts)), use_tqdm, options)

    def beam_search(
        self,
        prompts: PromptInput | Sequence[PromptInput],
        params: BeamSearchParams | Sequence[BeamSearchParams],
        use_tqdm: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        timeout: float | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts with the best sequences that a beam search finds, `beam_width` for each, the best first.

        The outputs equal those of transformers' `generate(num_beams=…)`; each has its `cumulative_logprob`. Prompts
        and errors are those of `generate`.

        Args:
            params: one for all prompts, or one for each.
            use_tqdm: show a progress bar.
            priority: one for all prompts, or one for each; under the policy `priority` the lower is served the sooner.
            timeout: seconds after which a search that is not complete ends with an error.

        Raises:
            RequestError: a prompt or its parameters cannot be served; none is submitted.
            EngineDeadError: the engine was gone before this call.
        """
        parsed = parse_prompts(prompts)
        several = list(params) if isinstance(params, list | tuple) else [params] * len(parsed)
        if len(several) != len(parsed):
            raise RequestError(
                f"params must be one for all prompts or one for each, got {len(several)} for {len(parsed)}", "params"
            )
        options = _options(priority, timeout, len(parsed))
        return self._run(parsed, [check_beam_params(each) for each in several], use_tqdm, options)

    def _run(
        self,
        prompts: list[Prompt],
        params: Sequence[SamplingParams | BeamSearchParams | None],
        use_tqdm: bool,
        options: list[dict[str, Any]],
    ) -> list[RequestOutput]:
        checked = _each(prompts, lambda index: self._engine.check(prompts[index], params[index]))
        try:
            requests = [self._engine.submit(each, **more) for each, more in zip(checked, options, strict=True)]
            self._finish(requests, use_tqdm)
        except BaseException:
            # Found by what is open, not by what `submit` returned: an interrupt may come between the two.
            for request_id in self._engine.open_request_ids():
                if request_id not in self._added:
                    self._engine.abort(request_id)
            raise
        return [request.output() for request in requests]

    def _finish(self, requests: list[_Request], use_tqdm: bool) -> None:
        with Progress(len(requests), use_tqdm) as progress:
            open_requests = {request.request_id: request for request in requests}
            while open_requests:
                news = self._engine.wait()
                for request in news:
                    if request.request_id in open_requests:
                        progress.update(request)
                        if request.finished:
                            del open_requests[request.request_id]
                    elif request.request_id in self._added:
                        self._pending[request.request_id] = request
                if not news and open_requests:
                    raise EngineDeadError("the engine was closed while it answered")

    # -- one request at a time ----------------------------------------------------------------------------------

    def add_request(
        self,
        prompt: PromptInput,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> str:
        """Submit one request and return its id at once; `step` brings its outputs. The rest is as in `generate`.

        Raises:
            RequestError: it cannot be served, or the id belongs to a request that still runs.
            EngineDeadError: the engine is gone.
        """
        checked = self._engine.check(parse_prompt(prompt), check_params(sampling_params))
        if request_id is not None and request_id in self._added:
            raise RequestError(f"request_id {request_id!r} belongs to a request that still runs", "request_id")
        request = self._engine.submit(checked, request_id, priority=priority, timeout=timeout)
        self._added.add(request.request_id)
        return request.request_id

    def step(self, timeout: float | None = None) -> list[RequestOutput]:
        """The outputs that arrived since the last call, one for each request that has news, with all its tokens so far.

        Waits for the first one, for up to `timeout` seconds (None: no limit); returns an empty list when there was
        none or when no request is open. A request's last output has `finished` set; under `best_of` above `n` there
        is no other.
        """
        arrived, self._pending = self._pending, {}
        if self.has_unfinished_requests():
            for request in self._engine.wait(0 if arrived else timeout):
                arrived[request.request_id] = request
        outputs = [request.output() for name, request in arrived.items() if name in self._added]
        self._added -= {output.request_id for output in outputs if output.finished}
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has outputs to bring, now or later."""
        return bool(self._added)

    def abort(self, request_id: str) -> None:
        """End a request; `step` brings what it had, with finish_reason "abort". Harmless when it is not open."""
        self._engine.abort(request_id)

    def reset_prefix_cache(self) -> None:
        """No later request is answered from prefixes that are cached now. Raises EngineError when it is gone."""
        self._engine.reset_prefix_cache()

    # -- the engine ---------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer; None under skip_tokenizer_init and for a remote engine."""
        return self._engine.tokenizer

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises EngineError where there is none."""
        if self.tokenizer is None:
            raise EngineError("there is no tokenizer here: skip_tokenizer_init is set, or the engine is remote")
        return self.tokenizer

    def close(self) -> None:
        """End the engine; open requests end with an error. Harmless twice."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _options(priority: int | Sequence[int] | None, timeout: float | None, count: int) -> list[dict[str, Any]]:
    """What `submit` is told of each of `count` requests. Raises RequestError for another number of priorities."""
    priorities = list(priority) if isinstance(priority, list | tuple) else [0 if priority is None else priority] * count
    if len(priorities) != count:
        raise RequestError(
            f"priority must be one for all prompts or one for each, got {len(priorities)} for {count}", "priority"
        )
    return [{"priority": each, "timeout": timeout} for each in priorities]


def _each(items: Sequence[Any], make: Callable[[int], Any]) -> list[Any]:
    """make(0), make(1), … for each item; a RequestError says which one it is about."""
    made = []
    for index in range(len(items)):
        try:
            made.append(make(index))
        except RequestError as error:
            raise at_index(error, index, len(items)) from error
    return made
