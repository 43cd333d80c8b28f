"""The ways in which a request may ask for structured output, made one; knows no engine and no grammar.

OpenAI's `response_format`, vLLM's `structured_outputs` and its older `guided_…` fields all become
`StructuredOutputsParams`. A request may use one of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from configs.errors import RequestError
from nanoengine.structured_outputs import FIELD, StructuredOutputsParams

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
_WAYS = ("response_format", FIELD, *_GUIDED)
_WHITESPACE = "guided_whitespace_pattern"
FIELDS = (*_WAYS, _WHITESPACE)
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")
_SCHEMA_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


class AskedForm(NamedTuple):
    """The form of the output, and the field that asked for it."""

    params: StructuredOutputsParams
    source: str

    def in_its_words(self, error: RequestError) -> RequestError:
        """An error about the form, naming the field that the client used."""
        if error.param != FIELD or self.source == FIELD:
            return error
        message = re.sub(rf"\b{FIELD}(\.\w+)?", self.source, error.message, count=1)
        return RequestError(message, self.source, error.code)


def asked_form(fields: Mapping[str, Any]) -> AskedForm | None:
    """What the fields of a request ask for, None if nothing.

    Raises:
        RequestError: more than one of them is used, or one is malformed; it names the field.
    """
    given = [name for name in _WAYS if fields.get(name) is not None]
    if len(given) > 1:
        raise RequestError(f"{given[1]} cannot be used together with {given[0]}", given[1])
    whitespace = fields.get(_WHITESPACE)
    if not given:
        if whitespace is not None:
            raise RequestError(f"{_WHITESPACE} needs guided_json", _WHITESPACE)
        return None
    (source,) = given
    value = fields[source]
    if source == "response_format":
        value = _openai_form(value)
    elif source in _GUIDED:
        value = {_GUIDED[source]: value, "whitespace_pattern": whitespace}
    elif whitespace is not None:
        raise RequestError(f"{_WHITESPACE} needs guided_json", _WHITESPACE)
    try:
        params = StructuredOutputsParams.of(value)
    except RequestError as error:
        raise AskedForm(StructuredOutputsParams(json_object=True), source).in_its_words(error) from None
    return None if params is None else AskedForm(params, source)


def _openai_form(value: Any) -> dict[str, Any] | None:
    kind = value.get("type") if isinstance(value, Mapping) else None
    if kind not in ("text", "json_object", "json_schema"):
        raise _error(".type", f"must be text, json_object or json_schema, got {kind!r:.100}")
    allowed = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    unknown = sorted(set(value) - allowed)
    if unknown:
        raise _error("", f"of type {kind} has no field {unknown[0]!r:.100}")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = value.get("json_schema")
    where = ".json_schema"
    if not isinstance(schema, Mapping):
        raise _error(where, f"must be an object, got {schema!r:.100}")
    unknown = sorted(set(schema) - set(_SCHEMA_FIELDS))
    if unknown:
        raise _error(where, f"has no field {unknown[0]!r:.100}")
    name = schema.get("name")
    if not isinstance(name, str) or _SCHEMA_NAME.fullmatch(name) is None:
        raise _error(where + ".name", f"must be 1 to 64 letters, digits, - or _, got {name!r:.100}")
    if not isinstance(schema.get("description"), str | None):
        raise _error(where + ".description", "must be text")
    if not isinstance(schema.get("strict"), bool | None):  # every schema is kept to, so both are served alike
        raise _error(where + ".strict", "must be true or false")
    if not isinstance(schema.get("schema"), Mapping):
        raise _error(where + ".schema", f"must be a JSON schema, got {schema.get('schema')!r:.100}")
    return {"json": schema["schema"]}


def _error(place: str, message: str) -> RequestError:
    return RequestError(f"response_format{place} {message}", f"response_format{place}")
