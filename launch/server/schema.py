"""What clients may send, and how it becomes sampling parameters and prompts; knows no engine and no route.

A field that is not supported is refused by name, unless its value asks for nothing: many clients send the defaults
of fields that they do not use.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from configs.errors import RequestError
from launch.server.response_format import FIELDS, AskedForm, asked_form
from nanoengine.beam_params import BeamSearchParams
from nanoengine.prompts import PromptInput, check_cache_salt
from nanoengine.sampling_params import SamplingParams

MAX_PROMPTS = 1024
MAX_MESSAGES = 16384
DEFAULT_MAX_TOKENS = 16
# What one request may generate at once, over all of its prompts.
MAX_SEQUENCES = 16384
_ANYTHING = object()

# Values that leave the answer as it is, for each field that is known but not supported (yet). null always is one.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "include_reasoning": (_ANYTHING,),
    "metadata": (_ANYTHING,),
    "modalities": (["text"],),
    "parallel_tool_calls": (_ANYTHING,),
    "prediction": (),
    "prompt_cache_key": (_ANYTHING,),
    "reasoning_effort": (),
    "safety_identifier": (_ANYTHING,),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "user": (_ANYTHING,),
    "verbosity": (),
}
_NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
_NEUTRAL_IN_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {
    "continuous_usage_stats": (False,),
    "include_obfuscation": (_ANYTHING,),
}

_SAMPLING_FIELDS = (
    "n",
    "best_of",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "min_tokens",
    "prompt_logprobs",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "detokenize",
    "stop",
    "stop_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
)
_BEAM_FIELDS = ("length_penalty", "early_stopping")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]
Stop = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "null"}]}),
]


EarlyStopping = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "boolean"}, {"const": "never"}, {"type": "null"}]})]


class Body(BaseModel):
    """A request's JSON object: types are taken as they are, and unknown fields are kept to be judged."""

    model_config = ConfigDict(extra="allow", strict=True)

    def refuse_unsupported(self) -> None:
        """Raise RequestError for the first field that asks for what is not supported."""
        refuse_unsupported(self.model_extra or {}, NEUTRAL)


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool | None = None


class SamplingFields(Body):
    """What completions and chat completions share. null means the default."""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    prompt_logprobs: int | None = None
    echo: bool | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    detokenize: bool | None = None
    stop: Stop = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: EarlyStopping = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    priority: int | None = None
    timeout: float | None = None

    def scheduling(self) -> dict[str, Any]:
        """What an engine is told of how to schedule the request: `priority` and `timeout`, where they are given."""
        given = {"priority": self.priority, "timeout": self.timeout}
        return {name: value for name, value in given.items() if value is not None}

    def salted(self, prompts: list[list[int]]) -> list[PromptInput]:
        """The prompts as an engine takes them. Raises RequestError for an impossible `cache_salt`."""
        salt = check_cache_salt(self.cache_salt)
        return [{"prompt_token_ids": prompt, "cache_salt": salt} if salt else prompt for prompt in prompts]

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self) -> None:
        """Raise RequestError for what no type can say."""
        self.refuse_unsupported()
        if self.stream_options is not None:
            refuse_unsupported(
                self.stream_options.model_extra or {}, _NEUTRAL_IN_STREAM_OPTIONS, prefix="stream_options."
            )
            if not self.stream:
                raise RequestError("stream_options needs stream: true", "stream_options")
        check_cache_salt(self.cache_salt)

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams | BeamSearchParams:
        """The parameters of each prompt. Raises RequestError for an impossible value."""
        if self.use_beam_search:
            with self.own_words():
                return self.beam_search_params(defaults)
        for name, neutral in (("length_penalty", 1), ("early_stopping", False)):
            value = getattr(self, name)
            if value is not None and not _same(value, neutral):
                raise RequestError(f"{name} needs use_beam_search: true, got {value!r:.100}", name)
        return self.sampling_params(defaults)

    def beam_search_params(self, defaults: Mapping[str, Any]) -> BeamSearchParams:
        """The parameters of a beam search of `n` beams; of the model's defaults only its length applies.

        Raises RequestError for an impossible value, and for a field that samples or stops in a way that it does not.
        """
        if self.stream:
            raise RequestError("stream must be false with use_beam_search, which ends before it can tell", "stream")
        given = {name: defaults[name] for name in defaults if name == "max_tokens"} | self._given_params()
        width = given.get("n", 1)
        asked, neutral = SamplingParams(**given), SamplingParams(n=width, best_of=width)
        taken = {field.name for field in dataclasses.fields(BeamSearchParams)}
        for name, value in given.items():
            if name not in taken | {"n", "seed"} and getattr(asked, name) != getattr(neutral, name):
                raise RequestError(f"{name} does not go with use_beam_search, got {value!r:.100}", name)
        own = {name: value for name in _BEAM_FIELDS if (value := getattr(self, name)) is not None}
        own |= {name: value for name, value in given.items() if name in taken}
        return BeamSearchParams(beam_width=width, **own)

    def _given_params(self) -> dict[str, Any]:
        given: dict[str, Any] = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        form = self.asked_form()
        if form is not None:
            given["structured_outputs"] = form.params
        return given | self.own_params()

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """The parameters of each prompt, with the model's defaults for what is left out.

        Raises RequestError for an impossible value.
        """
        params = SamplingParams(**{**defaults, **self._given_params()})
        if self.stream and params.ranks_candidates:
            raise RequestError(
                f"best_of must be n ({params.n}) in a stream, since the best are known only at the end, "
                f"got {params.best_of}", "best_of",
            )  # fmt: skip
        return params

    def asked_form(self) -> AskedForm | None:
        """The structured output that is asked for, in whichever way. Raises RequestError for a malformed one."""
        return asked_form({name: getattr(self, name) for name in FIELDS})

    @contextlib.contextmanager
    def own_words(self) -> Iterator[None]:
        """Where the engine refuses the structured output, name the field that asked for it."""
        try:
            yield
        except RequestError as error:
            form = self.asked_form()
            raise error if form is None else form.in_its_words(error) from None

    def own_params(self) -> dict[str, int | None]:
        """What the routes spell or default differently: `max_tokens`, `logprobs` and what follows from them."""
        raise NotImplementedError


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: Prompt
    logprobs: int | None = None

    @property
    def echo_alone(self) -> bool:
        """Whether the prompt is all that is asked for."""
        return bool(self.echo) and self.max_tokens == 0

    def own_params(self) -> dict[str, int | None]:
        # Left out, max_tokens is OpenAI's 16 whatever the checkpoint says; null says "as many as fit", as in
        # SamplingParams. An engine that is asked for the prompt alone generates one token that nobody sees.
        length = self.max_tokens if "max_tokens" in self.model_fields_set else DEFAULT_MAX_TOKENS
        own = {"max_tokens": 1 if self.echo_alone else length, "logprobs": self.logprobs}
        if self.echo and self.prompt_logprobs is None:
            own["prompt_logprobs"] = self.logprobs
        return own

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, all text or all token ids. Raises RequestError for any other form."""
        prompt = self.prompt
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and type(prompt[0]) is int):
            prompt = [prompt]
        if not isinstance(prompt, list) or not (_all_text(prompt) or all(_is_ids(entry) for entry in prompt)):
            raise RequestError(
                "prompt must be a string, a list of strings, a list of token ids, or a list of lists of token ids",
                "prompt",
                "invalid_type",
            )
        if not 0 < len(prompt) <= MAX_PROMPTS:
            raise RequestError(f"prompt must hold 1 to {MAX_PROMPTS} prompts, got {len(prompt)}", "prompt")
        return prompt


class ChatCompletionRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise RequestError(f"top_logprobs needs logprobs: true, got {self.top_logprobs}", "top_logprobs")

    def own_params(self) -> dict[str, int | None]:
        length = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        own = {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        # Left out or null, it is what the checkpoint says, or as many as fit.
        return own if length is None else own | {"max_tokens": length}

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams | BeamSearchParams:
        try:
            return super().params({"max_tokens": None, **defaults})
        except RequestError as error:
            renamed = {"logprobs": "top_logprobs"}
            if self.max_completion_tokens is not None:
                renamed["max_tokens"] = "max_completion_tokens"
            if error.param in renamed:
                message = error.message.replace(error.param, renamed[error.param])
                raise RequestError(message, renamed[error.param], error.code) from None
            raise


class TokenizeRequest(Body):
    """POST /tokenize: `prompt`, or `messages` as in a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]


def repeated_message(messages: list[dict[str, Any]], echo: bool | None) -> str:
    """What `echo` puts in front of the answer to a conversation: a last message of the assistant's, as in vLLM."""
    return str(messages[-1]["content"]) if echo and messages[-1]["role"] == "assistant" else ""


def check_num_sequences(num_prompts: int, params: SamplingParams | BeamSearchParams) -> None:
    """Raise RequestError when prompts and their outputs are too many together."""
    if isinstance(params, BeamSearchParams):
        params = params.sampling_params()
    if num_prompts * params.num_sequences > MAX_SEQUENCES:
        name = "n" if params.best_of is None else "best_of"
        raise RequestError(
            f"{name} must be at most {MAX_SEQUENCES // num_prompts} with {num_prompts} prompts, "
            f"got {params.num_sequences}", name,
        )  # fmt: skip


def num_outputs(params: SamplingParams | BeamSearchParams) -> int:
    """How many choices each prompt gets."""
    return params.beam_width if isinstance(params, BeamSearchParams) else params.n


def chat_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as chat templates know them: a known role and text.

    Raises:
        RequestError: names the place of what is not supported, e.g. `messages[1].content[0].type`.
    """
    return [_chat_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _chat_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(f"{where}.role must be one of {', '.join(_ROLES)}, got {role!r:.100}", f"{where}.role")
    taken: dict[str, Any] = {"role": _ROLES[role], "content": _content(message.get("content"), role, where)}
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            if not isinstance(message[name], str):
                raise RequestError(f"{where}.{name} must be a string", f"{where}.{name}", "invalid_type")
            taken[name] = message[name]
    rest = {name: value for name, value in message.items() if name not in ("role", "content", "name", "tool_call_id")}
    refuse_unsupported(rest, _NEUTRAL_IN_MESSAGE, prefix=f"{where}.")
    return taken


def _content(content: Any, role: str, where: str) -> str:
    if isinstance(content, str):
        return content
    if content is None and role == "assistant":
        return ""
    param = f"{where}.content"
    if not isinstance(content, list) or not content:
        raise RequestError(f"{param} must be a string or a list of text parts", param, "invalid_type")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text"):
            raise RequestError(
                f"{param}[{index}].type must be 'text', the only kind supported, got {kind!r:.100}",
                f"{param}[{index}].type",
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{param}[{index}].text must be a string", f"{param}[{index}].text", "invalid_type")
        texts.append(part["text"])
    return "\n".join(texts)


def refuse_unsupported(extra: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], prefix: str = "") -> None:
    """Raise RequestError for the first field that is unknown, or known and not neutral."""
    for name, value in extra.items():
        if name not in neutral:
            raise RequestError(f"{prefix}{name:.100} is not a field that this server knows", f"{prefix}{name:.100}")
        allowed = neutral[name]
        if value is None or _ANYTHING in allowed or any(_same(value, each) for each in allowed):
            continue
        named = ", ".join(["null", *(repr(each) for each in allowed)])
        raise RequestError(
            f"{prefix}{name} is not supported (only {named}), got {value!r:.100}", f"{prefix}{name}", "unsupported"
        )


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: 0 and 0.0 are, 0 and false are not."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _all_text(prompts: list[Any]) -> bool:
    return all(isinstance(entry, str) for entry in prompts)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)
