"""The client of a running server, over its OpenAI API; knows no model, no tokenizer and no engine.

It stands where `nanoengine.llm_engine.LLMEngine` stands for a local engine. Requests run in a few threads, one
connection each, with the standard library alone. Proxies from the environment are not used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import itertools
import json
import math
import queue
import socket
import time
import urllib.parse
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from configs.errors import (
    ConfigError,
    EngineDeadError,
    EngineError,
    NanoEngineError,
    QueueFullError,
    RequestError,
    RequestTimeoutError,
    UnknownModelError,
)
from nanoengine.beam_params import BeamSearchParams
from nanoengine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nanoengine.prompts import Message, Prompt
from nanoengine.sampling_params import SamplingParams

MAX_CONNECTIONS = 64
CONNECT_TIMEOUT = 10.0
# Seconds without a byte from the server: an answer comes whole, so this bounds the time of a request.
ANSWER_TIMEOUT = 600.0
MAX_ANSWER_BYTES = 256 * 2**20


@dataclasses.dataclass(eq=False)
class RemoteRequest:
    """A request on its way. `finished` is set once, by whoever ends it first."""

    request_id: str
    prompt: Prompt
    path: str
    payload: bytes
    metrics: RequestMetrics
    outputs: list[CompletionOutput] = dataclasses.field(default_factory=list)
    prompt_token_ids: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    finished: bool = False
    connection: http.client.HTTPConnection | None = None
    future: Future[None] | None = None

    def end(self, reason: str, error: NanoEngineError | None = None) -> None:
        """Finish without an answer."""
        last = CompletionOutput(0, "", [], finish_reason=reason)
        if error is not None:
            last.error, last.error_kind = error.message, type(error).__name__
        self.outputs = [last]
        self.finish()

    def finish(self) -> None:
        """Note the time; nothing changes afterwards."""
        self.metrics.finished_time = time.time()
        self.finished = True

    def output(self) -> RequestOutput:
        """A snapshot for the caller. Token ids are there when the server gave them."""
        return RequestOutput(
            self.request_id,
            self.prompt.text,
            list(self.prompt_token_ids),
            self.outputs or [CompletionOutput(0, "", [])],
            self.finished,
            dataclasses.replace(self.metrics),
            self.prompt_logprobs,
        )


class RemoteEngine:
    """A server at `base_url` (with or without /v1).

    Args:
        model: its name there; None stands for the first that the server has.

    Raises:
        ConfigError: the address is no HTTP address.
        EngineError: the server cannot be reached, or refuses (a missing key, say).
        UnknownModelError: it has no such model.
    """

    tokenizer = None

    def __init__(self, base_url: str, api_key: str | None = None, model: str | None = None) -> None:
        parts = urllib.parse.urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url must be like http://127.0.0.1:8000, got {base_url!r}", "base_url")
        self._address = parts
        self._root = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._serial = itertools.count()
        self._open: dict[str, RemoteRequest] = {}
        self._ended: queue.SimpleQueue[RemoteRequest] = queue.SimpleQueue()
        self._closed = False
        self.model = self._find_model(model)
        self._pool = ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="nanoengine-remote")

    # -- what LLM asks of an engine -----------------------------------------------------------------------------

    def check(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None
    ) -> tuple[Prompt, SamplingParams | BeamSearchParams | None]:
        """Check what can be known without the model. Raises RequestError."""
        if not (prompt.text or prompt.token_ids or prompt.messages):
            raise RequestError("the prompt must not be empty", "prompt")
        return prompt, params

    def submit(
        self,
        request: tuple[Prompt, SamplingParams | BeamSearchParams | None],
        request_id: str | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> RemoteRequest:
        """Send a checked request. Raises RequestError for its id, EngineDeadError after `close`."""
        if self._closed:
            raise EngineDeadError("the engine was closed")
        prompt, params = request
        request_id = request_id or f"remote-{next(self._serial)}"
        if request_id in self._open:
            raise RequestError(f"request_id {request_id!r} belongs to a request that still runs", "request_id")
        path = "/v1/completions" if prompt.messages is None else "/v1/chat/completions"
        scheduling = ({"priority": priority} if priority else {}) | ({} if timeout is None else {"timeout": timeout})
        payload = self._payload(prompt, params, scheduling)
        remote = RemoteRequest(request_id, prompt, path, payload, RequestMetrics(time.time()))
        self._open[request_id] = remote
        remote.future = self._pool.submit(self._serve, remote)
        return remote

    def render_chat(self, messages: list[Message], variables: dict[str, Any]) -> Prompt:
        """The conversation as it is: the server renders it, with its own template and defaults."""
        if variables != {"add_generation_prompt": True}:
            raise RequestError(
                "variables of the chat template cannot be set on a remote engine", "chat_template_kwargs"
            )
        return Prompt(messages=messages)

    def wait(self, timeout: float | None = None) -> list[RemoteRequest]:
        """Return the requests that ended, as soon as there are any, or an empty list after `timeout` seconds.

        An answer comes whole, so there is no other news than the end.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        ended: list[RemoteRequest] = []
        while not ended and self._open:
            left = None if deadline is None else deadline - time.monotonic()
            try:
                # Waits in short pieces: a wait without end could not be interrupted everywhere.
                remote = self._ended.get(timeout=0.5 if left is None else max(0.0, min(left, 0.5)))
            except queue.Empty:
                if left is not None and left <= 0:
                    break
                continue
            ended += self._settled(remote)
            with contextlib.suppress(queue.Empty):
                while True:
                    ended += self._settled(self._ended.get_nowait())
        return ended

    def abort(self, request_id: str) -> None:
        """Hang up on a request, upon which the server ends it. Harmless when it is not open."""
        remote = self._open.get(request_id)
        if remote is None or remote.finished:
            return
        remote.end("abort")
        if remote.future is not None and remote.future.cancel():
            self._ended.put(remote)
        connection = remote.connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def reset_prefix_cache(self) -> None:
        """Have the server forget its cached prefixes. Raises EngineError."""
        self._call(self._connect(), "POST", "/reset_prefix_cache")

    def open_request_ids(self) -> list[str]:
        """Ids of the requests that have not ended yet."""
        return [request_id for request_id, remote in self._open.items() if not remote.finished]

    def close(self) -> None:
        """Hang up on every request. Harmless twice; the server goes on."""
        self._closed = True
        for request_id in self.open_request_ids():
            self.abort(request_id)
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _settled(self, remote: RemoteRequest) -> list[RemoteRequest]:
        return [] if self._open.pop(remote.request_id, None) is None else [remote]

    # -- HTTP ---------------------------------------------------------------------------------------------------

    def _find_model(self, model: str | None) -> str:
        served = [str(entry["id"]) for entry in self._call(self._connect(), "GET", "/v1/models").get("data", [])]
        if not served:
            raise EngineError(f"the server at {self._address.netloc} has no model")
        if model is not None and model not in served:
            raise UnknownModelError(
                f"the server at {self._address.netloc} has no model {model!r}; it has: {', '.join(served)}"
            )
        return model or served[0]

    def _payload(
        self, prompt: Prompt, params: SamplingParams | BeamSearchParams | None, scheduling: dict[str, Any]
    ) -> bytes:
        beams: dict[str, Any] = {}
        if isinstance(params, BeamSearchParams):
            beams = {name: getattr(params, name) for name in ("length_penalty", "early_stopping")}
            beams["use_beam_search"], params = True, params.sampling_params()
        # Only what differs from the defaults is sent, so that a server which knows fewer fields than ours can answer.
        defaults = SamplingParams()
        known = defaults.to_dict()
        given = (params or defaults).to_dict()
        body = {name: value for name, value in given.items() if value != known[name]}
        body |= {"model": self.model, "max_tokens": given["max_tokens"], "return_token_ids": True} | scheduling | beams
        if params is not None:  # given as they are, so that no default of the server's checkpoint takes their place
            body |= {name: given[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        if prompt.cache_salt:
            body["cache_salt"] = prompt.cache_salt
        if prompt.messages is not None:
            body["messages"] = [dict(message) for message in prompt.messages]
            if "logprobs" in body:
                body |= {"logprobs": True, "top_logprobs": given["logprobs"]}
        else:
            body["prompt"] = prompt.text if prompt.token_ids is None else prompt.token_ids
        try:
            return json.dumps(body).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"the request has no JSON form: {error}", "messages") from error

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        assert self._address.hostname is not None
        connection = kind(self._address.hostname, self._address.port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
        except OSError as error:
            raise EngineError(f"cannot reach the server at {self._address.netloc}: {error}") from error
        connection.sock.settimeout(ANSWER_TIMEOUT)
        return connection

    def _call(
        self, connection: http.client.HTTPConnection, method: str, path: str, payload: bytes | None = None
    ) -> dict[str, Any]:
        """One request and its JSON answer. Raises RequestError for a 4xx, EngineError for anything else."""
        where = f"the server at {self._address.netloc}"
        try:
            connection.request(method, self._root + path, payload, self._headers)
            response = connection.getresponse()
            data = response.read(MAX_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise EngineError(f"{where} did not answer: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if response.status == 200 and isinstance(answer, dict):
            return answer
        raise _refusal(where, response.status, answer)

    def _serve(self, remote: RemoteRequest) -> None:
        """In a thread of the pool: run one request to its end."""
        try:
            remote.connection = self._connect()
            if not remote.finished:  # aborted while it waited for its turn
                answer = self._call(remote.connection, "POST", remote.path, remote.payload)
                if not remote.finished:
                    _read_answer(remote, answer)
        except NanoEngineError as error:
            if not remote.finished:
                remote.end("error", error)
        except Exception as error:  # an answer of another shape: this request fails alone
            if not remote.finished:
                remote.end("error", EngineError(f"unreadable answer: {type(error).__name__}: {error}"))
        finally:
            if remote.connection is not None:
                remote.connection.close()
            self._ended.put(remote)


def _refusal(where: str, status: int, answer: Any) -> NanoEngineError:
    error = answer.get("error") if isinstance(answer, dict) else None
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or f"{where} answered with status {status}")
    if status in (400, 413, 422):
        return RequestError(message, error.get("param"), error.get("code"))
    if status == 429:
        return QueueFullError(message)
    if status == 504 and error.get("code") == "request_timeout":
        return RequestTimeoutError(message)
    return EngineError(f"{where} answered with status {status}: {message}" if error else message)


def _read_answer(remote: RemoteRequest, answer: dict[str, Any]) -> None:
    """Take over a completion or chat completion object."""
    outputs = []
    prompt_token_ids = remote.prompt.token_ids or answer.get("prompt_token_ids")
    prompt_logprobs = answer.get("prompt_logprobs")
    for choice in answer["choices"]:
        prompt_logprobs = prompt_logprobs or choice.get("prompt_logprobs")
        logprobs = _read_logprobs(choice)
        text = choice["message"].get("content") if "message" in choice else choice["text"]
        prompt_token_ids = prompt_token_ids or choice.get("prompt_token_ids")
        outputs.append(
            CompletionOutput(
                choice["index"],
                text or "",
                list(choice.get("token_ids") or []),
                _cumulative(logprobs),
                logprobs,
                finish_reason=choice["finish_reason"],
                stop_reason=choice.get("stop_reason"),
            )
        )
    usage = answer.get("usage") or {}
    remote.outputs = sorted(outputs, key=lambda output: output.index)
    remote.prompt_token_ids = list(prompt_token_ids or [])
    if prompt_logprobs is not None:
        remote.prompt_logprobs = [None if entry is None else _read_entry(entry) for entry in prompt_logprobs]
    remote.num_prompt_tokens = int(usage.get("prompt_tokens", len(remote.prompt_token_ids)))
    details = usage.get("prompt_tokens_details") or {}
    remote.metrics.num_cached_tokens = int(details.get("cached_tokens") or 0)
    remote.metrics.num_generated_tokens = max((len(output.token_ids) for output in outputs), default=0)
    remote.num_generated_tokens = remote.metrics.num_completion_tokens = int(
        usage.get("completion_tokens", sum(len(output.token_ids) for output in outputs))
    )
    remote.finish()


def _read_logprobs(choice: dict[str, Any]) -> list[dict[int, Logprob]] | None:
    """The log-probabilities of a choice's tokens by token id. OpenAI's own shape names tokens by their text alone."""
    if choice.get("logprobs") is None:
        return None
    if "output_logprobs" not in choice:
        raise EngineError("the server's log-probabilities come without token ids; nanoengine's have them")
    return [_read_entry(entry) for entry in choice["output_logprobs"]]


def _read_entry(entry: dict[str, Any]) -> dict[int, Logprob]:
    return {
        int(token_id): Logprob(told["logprob"], told["rank"], told["decoded_token"]) for token_id, told in entry.items()
    }


def _cumulative(logprobs: list[dict[int, Logprob]] | None) -> float | None:
    """The sum over the chosen tokens, each the first of its entry."""
    return None if logprobs is None else math.fsum(next(iter(entry.values())).logprob for entry in logprobs if entry)
