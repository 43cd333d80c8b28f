"""What form an output must have, and that form as one grammar for llguidance; knows no tokenizer, process or request.

Everything becomes one string in llguidance's own form, whatever it was asked for with. Names and meanings are vLLM's
(`StructuredOutputsParams`). Building the string may be slow for a hostile input (`to_grammar` is quadratic in the
rules of a GBNF grammar), so that is done where it can be killed: `nanoengine.grammar_process`.

Why llguidance and not xgrammar: it builds its automata lazily and within budgets, so a hostile expression is an error
and not a long compilation; an ordinary schema is ready in a few milliseconds; it is one wheel without torch, which a
front end must not load, and it reads a tokenizer.json by itself.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from configs.errors import RequestError

FIELD = "structured_outputs"
# Of a schema, an expression or a grammar, and of all choices together.
MAX_CHARS = 65_536
MAX_CHOICES = 4096
MAX_WHITESPACE_PATTERN_CHARS = 256
# What JSON may hold between two of its tokens, unless the request says otherwise: enough to be written in any usual
# way. Without a bound a model that has lost its way goes on with blanks until max_tokens.
WHITESPACE_PATTERN = r"[ \t]{1,8}|\r?\n[ \t]{0,64}"

# Of a schema: what holds schemas by names of its own, and what holds no schema.
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_DATA = ("enum", "const", "default", "examples", "x-guidance")
# Reasoning, up to its closing tag, in front of the form.
_THOUGHT = 'thought[suffix="</think>"]: /(?s:.*)/\n'
_REASONING = {
    "optional": "start: (/<think>/ thought /[ \\n]{0,4}/)? @form\n" + _THOUGHT,
    "open": "start: thought /[ \\n]{0,4}/ @form\n" + _THOUGHT,
}
_FORMS = ("json", "regex", "choice", "grammar", "json_object")


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    r"""The form of an output: exactly one of the first five.

    Attributes:
        json: a JSON schema (Draft 2020-12), an object or its text. Properties come in the schema's order.
        regex: a regular expression in the syntax of Rust's `regex` crate, matched against the whole output.
        choice: texts, one of which is the output.
        grammar: a context-free grammar, in GBNF (`root ::= …`, as in llama.cpp and xgrammar) or in llguidance's
            dialect of Lark (`start: …`).
        json_object: true for any JSON object.
        disable_any_whitespace: compact JSON; otherwise JSON may be indented, and hold a few blanks anywhere.
        disable_additional_properties: objects with `properties` have no others, unless the schema says otherwise.
        whitespace_pattern: a regular expression of the whitespace that JSON may hold, e.g. `[ \n]{0,4}`.
        reasoning: what may come in front of the form: "optional" is `<think>…</think>`, "open" goes on in a tag that
            the prompt has opened. None: nothing.

    Raises:
        RequestError: on construction; names the field at fault.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    reasoning: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _FORMS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise _error("", f"must have exactly one of {', '.join(_FORMS)}, got {', '.join(given) or 'none'}")
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), bool):
                raise _error(name, f"must be true or false, got {getattr(self, name)!r:.100}")
        for name, limit in (
            ("regex", MAX_CHARS),
            ("grammar", MAX_CHARS),
            ("whitespace_pattern", MAX_WHITESPACE_PATTERN_CHARS),
        ):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name), limit)
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))
        self._check_options()

    def _check_options(self) -> None:
        if self.reasoning is not None and self.reasoning not in tuple(_REASONING):
            raise _error("reasoning", f"must be one of {', '.join(_REASONING)}, got {self.reasoning!r:.100}")
        options = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")
        asked = [name for name in options if getattr(self, name)]
        if asked and self.json is None and not self.json_object:
            raise _error(asked[0], f"belongs to json or json_object, and {self.form} is given")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise _error("whitespace_pattern", "cannot be given with disable_any_whitespace")

    @property
    def form(self) -> str:
        """Which of the five is given."""
        return next(name for name in _FORMS if getattr(self, name) not in (None, False))

    @classmethod
    def of(cls, value: object) -> StructuredOutputsParams | None:
        """From what a caller gives for it: None, an instance, or a mapping of its fields. Raises RequestError."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise _error("", f"must be an object, got {value!r:.100}")
        unknown = [name for name in value if name not in {field.name for field in dataclasses.fields(cls)}]
        if unknown:
            raise _error("", f"has no field {unknown[0]!r:.100}")
        given = {name: each for name, each in value.items() if each is not None}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, without what is left at its default."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["choice"] = None if self.choice is None else list(self.choice)
        return {name: value for name, value in values.items() if value not in (None, False)}

    def to_grammar(self) -> str:
        """The same as llguidance reads it, a JSON object with a list of grammars.

        Raises:
            RequestError: a GBNF grammar is malformed. Whether llguidance takes the rest, it must be asked.
        """
        if self.json is not None or self.json_object:
            form: dict[str, Any] = {"json_schema": self.schema()}
        else:
            form = {"lark_grammar": self._lark()}
        if self.reasoning is None:
            return json.dumps({"grammars": [form]})
        return json.dumps({"grammars": [{"lark_grammar": _REASONING[self.reasoning]}, form | {"name": "form"}]})

    def schema(self) -> dict[str, Any]:
        """The JSON schema as llguidance is to see it, of `json` or `json_object`."""
        schema = json.loads(self.json) if isinstance(self.json, str) else {"type": "object"}
        assert isinstance(schema, dict)
        for each in _subschemas(schema):
            _tighten_range(each)
            if self.disable_additional_properties:
                _close(each)
        own = schema.get("x-guidance", {})  # llguidance's own way to say it
        if isinstance(own, dict):
            if self.disable_any_whitespace:
                own = own | {"whitespace_flexible": False}
            elif self.whitespace_pattern is not None:
                own = own | {"whitespace_pattern": self.whitespace_pattern}
            elif not own.keys() & {"whitespace_flexible", "whitespace_pattern"}:
                own = own | {"whitespace_pattern": WHITESPACE_PATTERN}
            schema["x-guidance"] = own
        return schema

    def _lark(self) -> str:
        import llguidance  # here: a front end has no use for it

        if self.choice is not None:
            return "start: " + " | ".join(json.dumps(text) for text in self.choice)
        if self.regex is not None:
            return f"start: /{llguidance.regex_to_lark(self.regex, '')}/"
        from llguidance.gbnf_to_lark import any_to_lark

        assert self.grammar is not None
        try:
            return any_to_lark(self.grammar)
        except Exception as error:  # the converter raises bare Exception
            raise _error("grammar", f"is not a valid grammar: {error}") from None


def _error(name: str, message: str) -> RequestError:
    return RequestError(f"{FIELD}.{name} {message}" if name else f"{FIELD} {message}", FIELD)


def _check_text(name: str, text: object, limit: int) -> str:
    if not isinstance(text, str) or not 0 < len(text) <= limit:
        got = f"{len(text)} characters" if isinstance(text, str) else repr(text)[:100]
        raise _error(name, f"must be text of 1 to {limit} characters, got {got}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _error(name, f"holds a lone surrogate at character {error.start}") from None
    return text


def _schema_text(schema: object) -> str:
    """A schema as compact ASCII JSON, its keys in their order."""
    if not isinstance(schema, str | Mapping) or (isinstance(schema, str) and len(schema) > MAX_CHARS):
        got = f"{len(schema)} characters" if isinstance(schema, str) else repr(schema)[:100]
        raise _error("json", f"must be a JSON schema of at most {MAX_CHARS} characters, got {got}")
    try:
        data = json.loads(schema) if isinstance(schema, str) else dict(schema)
        text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError) as error:
        raise _error("json", f"is not a JSON schema: {type(error).__name__}: {error}") from None
    if not isinstance(data, dict):
        raise _error("json", f"must be a JSON object, got {text:.100}")
    if len(text) > 6 * MAX_CHARS or (len(text) > MAX_CHARS and len(json.dumps(data, ensure_ascii=False)) > MAX_CHARS):
        raise _error("json", f"must be a JSON schema of at most {MAX_CHARS} characters")
    return text


def _choices(choices: object) -> tuple[str, ...]:
    if not isinstance(choices, list | tuple) or not all(isinstance(text, str) for text in choices):
        raise _error("choice", f"must be a list of texts, got {choices!r:.100}")
    length = sum(map(len, choices))
    if not 0 < len(choices) <= MAX_CHOICES or length > MAX_CHARS:
        raise _error(
            "choice",
            f"must be 1 to {MAX_CHOICES} texts of {MAX_CHARS} characters in all, got {len(choices)} of {length}",
        )
    for text in choices:
        if text:
            _check_text("choice", text, MAX_CHARS)
    return tuple(choices)


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and every schema in it."""
    left: list[Any] = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, dict):
            yield node
            for key, value in node.items():
                if key in _NAMED_SCHEMAS and isinstance(value, dict):
                    left += value.values()
                elif key not in _DATA:
                    left.append(value)


def _close(schema: dict[str, Any]) -> None:
    """Let an object that names properties, and says nothing of others, have no others."""
    if "properties" in schema or "patternProperties" in schema:
        schema.setdefault("additionalProperties", False)


def _tighten_range(schema: dict[str, Any]) -> None:
    """Move an exclusive bound a little inwards where llguidance 1.9.1 would let the bound itself pass.

    It does where the bound is a whole number and the other bound lies less than 1 away: 4 in (4, 4.5). What is lost
    is less than a millionth of the range.
    """
    for exclusive, others, sign in (
        ("exclusiveMinimum", ("maximum", "exclusiveMaximum"), 1),
        ("exclusiveMaximum", ("minimum", "exclusiveMinimum"), -1),
    ):
        bound = schema.get(exclusive)
        for other in others:
            limit = schema.get(other)
            if _is_number(bound) and _is_number(limit) and bound == int(bound) and 0 < sign * (limit - bound) < 1:
                schema[exclusive] = bound + (limit - bound) * 2.0**-20


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
