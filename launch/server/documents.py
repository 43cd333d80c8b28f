"""What the OpenAPI document says of answers, since routes make theirs by hand; knows no engine and no route's code.

The shapes say what is always there; answers hold more where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from launch.server.middleware import OPEN_PATHS
from launch.server.streams import LAST_ID_HEADER, RESUME_HEADER
from nanoengine.sampling_params import SamplingParams


class _Shape(BaseModel):
    model_config = ConfigDict(extra="allow")


class ErrorInfo(_Shape):
    """What went wrong: a sentence, its kind, and, where there is one, the field at fault and a fixed code."""

    message: str
    type: str
    param: str | None
    code: str | None


class Error(_Shape):
    """The body of every answer that is not 2xx."""

    error: ErrorInfo


class Usage(_Shape):
    """Tokens of all prompts, each counted once, and all that were generated for them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Choice(_Shape):
    index: int
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length", "tool_calls", "abort", "error"] | None


class CompletionChoice(_Choice):
    """One output of one prompt."""

    text: str


class Completion(_Shape):
    """The answer to /v1/completions; in a stream each event holds one, with what is new of its choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None


class FunctionCall(_Shape):
    """The name of a tool, and its arguments as the text of a JSON object."""

    name: str
    arguments: str


class ToolCall(_Shape):
    """A call that the model asks for; its result comes back in a message of the role tool, under the same id."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(_Shape):
    """What the model says, or which tools it calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(_Choice):
    """One answer of several."""

    message: Message


class ChatCompletion(_Shape):
    """The answer to /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(_Shape):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(_Shape):
    """All models, which is one."""

    object: Literal["list"]
    data: list[Model]


class Tokens(_Shape):
    """The ids of a text, and the tokens as they stand in the vocabulary where these are asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Text(_Shape):
    """The text of ids."""

    prompt: str


_ANSWERS: dict[str, type[BaseModel]] = {
    "/v1/completions": Completion,
    "/v1/chat/completions": ChatCompletion,
    "/v1/models": ModelList,
    "/v1/models/{model}": Model,
    "/tokenize": Tokens,
    "/detokenize": Text,
}
_RANGES = {field.name: field.metadata for field in dataclasses.fields(SamplingParams) if "help" in field.metadata}
_STREAMED = ("/v1/completions", "/v1/chat/completions", "/generate")
_ONLY_STREAMED = ("/v1/streams/{stream_id}",)
_EVENTS = "Server-sent events, each with a JSON object, and `data: [DONE]` at the end."
_RESUME = {
    "name": RESUME_HEADER,
    "in": "header",
    "description": "1: the events of the stream have ids, and it can be resumed behind each of them.",
    "schema": {"type": "string", "enum": ["0", "1"]},
}
_LAST_ID = {
    "name": LAST_ID_HEADER,
    "in": "header",
    "description": "The id of the last event that was received; without it the stream comes from its beginning.",
    "schema": {"type": "string"},
}
_ERRORS = {
    "400": "The request cannot be served as it stands; `param` names the field.",
    "404": "There is no such model or stream.",
    "413": "The body is too large.",
    "429": "Too many requests wait; come again after Retry-After seconds.",
    "4XX": "The request is refused.",
    "500": "A fault of the server's.",
    "503": "The model loads, or the server stops or has failed.",
    "504": "The request took longer than its timeout.",
}
_UNAUTHORISED = {"401": "The server asks for a key, and this is none."}


def document(app: FastAPI) -> None:
    """Let the app's OpenAPI document tell of answers and errors."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _amend(app.openapi_schema)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _amend(schema: dict[str, Any]) -> None:
    shapes: list[type[BaseModel]] = [Error, *_ANSWERS.values()]
    _, shown = models_json_schema(
        [(shape, "serialization") for shape in shapes],
        ref_template="#/components/schemas/{model}",
    )
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components.update(shown["$defs"])
    for name in ("HTTPValidationError", "ValidationError"):  # errors have another form here
        components.pop(name, None)
    for shape in components.values():
        for name, field in shape.get("properties", {}).items():
            if name in _RANGES and shape.get("title", "").endswith("Request"):
                _add_range(field, _RANGES[name])
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            _amend_answers(path, method, operation["responses"])
            if path in _STREAMED or path in _ONLY_STREAMED:
                operation.setdefault("parameters", []).append(_LAST_ID if path in _ONLY_STREAMED else _RESUME)


def _add_range(field: dict[str, Any], setting: Mapping[str, Any]) -> None:
    """Tell a field's meaning and range, which its declaration among the sampling parameters knows."""
    field.setdefault("description", setting["help"])
    for kind in field.get("anyOf", [field]):
        if kind.get("type") in ("integer", "number"):
            bounds = {"minimum": "minimum", "maximum": "maximum", "exclusiveMinimum": "above"}
            kind.update({name: setting[key] for name, key in bounds.items() if setting[key] is not None})


def _amend_answers(path: str, method: str, answers: dict[str, Any]) -> None:
    answers.pop("422", None)
    content = answers.get("200", {}).get("content", {})
    if path in _ANSWERS:
        content["application/json"] = {"schema": _reference(_ANSWERS[path])}
    if path in _STREAMED or path in _ONLY_STREAMED:
        content["text/event-stream"] = {"schema": {"type": "string", "description": _EVENTS}}
    if path in _ONLY_STREAMED:
        del content["application/json"]
        answers["204"] = {"description": "The stream has ended, and nothing follows the named event."}
    errors = dict(_ERRORS) if method == "post" or "{" in path else {"4XX": _ERRORS["4XX"], "503": _ERRORS["503"]}
    if path not in OPEN_PATHS:
        errors |= _UNAUTHORISED
    for status, why in errors.items():
        answers[status] = {"description": why, "content": {"application/json": {"schema": _reference(Error)}}}


def _reference(shape: type[BaseModel]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{shape.__name__}"}
