"""The tools of a chat request and which of them must be called; knows no template and no answer.

A call that must come, or whose arguments must be exact (`strict`), is a grammar for structured output, in the form that
`tool_calls.HermesParser` reads.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import RequestError
from launch.server.tool_calls import HermesParser
from nanoengine.structured_outputs import FIELD, StructuredOutputsParams

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_FUNCTION_FIELDS = ("name", "description", "parameters", "strict")


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function that the model may call. `parameters` is the JSON schema of its arguments, always an object's."""

    name: str
    parameters: Mapping[str, Any]
    strict: bool
    place: str

    def schema(self) -> dict[str, Any]:
        """The schema for the grammar. Raises RequestError when it is none."""
        try:
            return StructuredOutputsParams(json=self.parameters).schema()
        except RequestError as error:
            param = f"{self.place}.function.parameters"
            raise RequestError(error.message.replace(f"{FIELD}.json", param), param, error.code) from None


@dataclasses.dataclass(frozen=True)
class ToolPlan:
    """What a request wants of its tools.

    Attributes:
        tools: those that may be called; none under tool_choice "none".
        shown: what the chat template is given, as the client sent it; None: nothing.
        is_forced: whether the answer must be a call.
        limit: how many calls there may be; None: any number.
    """

    tools: Sequence[Tool] = ()
    shown: list[dict[str, Any]] | None = None
    is_forced: bool = False
    limit: int | None = None

    @property
    def names(self) -> frozenset[str]:
        """The names that may be called."""
        return frozenset(tool.name for tool in self.tools)

    def grammar(self, tags_are_tokens: bool = False) -> str | None:
        """In llguidance's dialect of Lark, what the answer must be; None when it may be anything.

        `tags_are_tokens` says that the tokenizer has the tags as special tokens, which no text matches.
        """
        if not self.is_forced and not any(tool.strict for tool in self.tools):
            return None
        opens, closes = (tag if tags_are_tokens else f'"{tag}"' for tag in (HermesParser.OPEN, HermesParser.CLOSE))
        bodies = [f"call_{index}" for index in range(len(self.tools))]
        lines = [f"call: {' | '.join(bodies)}"]
        for index, tool in enumerate(self.tools):
            is_exact = self.is_forced or tool.strict
            schema = tool.schema() if is_exact else StructuredOutputsParams(json_object=True).schema()
            head = json.dumps(f'{{"name": "{tool.name}", "arguments": ')
            lines.append(f'{bodies[index]}: {head} arguments_{index} "}}"')
            lines.append(f"arguments_{index}: %json {_quoted(schema)}")
        if self.is_forced:
            start = 'tagged ("\\n" tagged)*' if self.limit is None else "tagged"
            return "\n".join([f"start: {start}", f'tagged: {opens} "\\n" call "\\n" {closes}', *lines])
        # The model's own words up to a tag, which begins a call, and so on.
        often = "*" if self.limit is None else "?"
        words = (
            ["text: /(?s:.*)/", f"words: text {opens}"] if tags_are_tokens else [f"words[suffix={opens}]: /(?s:.*)/"]
        )
        ends = ["rest: /(?s:.*)/", f'close: "\\n"? {closes}']
        return "\n".join([f'start: (words "\\n"? call close){often} rest', *words, *ends, *lines])


def _quoted(schema: Mapping[str, Any]) -> str:
    """JSON that no converter takes for a grammar of another dialect, which it knows by `::=`."""
    return json.dumps(schema).replace("::=", "\\u003a:=")


def plan_tools(tools: list[dict[str, Any]] | None, choice: Any, parallel: bool | None) -> ToolPlan:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`. Raises RequestError, naming the place at fault."""
    known = _read_tools(tools or [])
    names = [tool.name for tool in known]
    if choice is None or choice in ("auto", "none"):
        if not known or choice == "none":
            return ToolPlan()
        return ToolPlan(known, tools, limit=1 if parallel is False else None)
    name = _named(choice)
    if not known:
        raise RequestError("tool_choice needs tools", "tool_choice")
    if choice == "required":
        return ToolPlan(known, tools, is_forced=True, limit=1 if parallel is False else None)
    if name not in names:
        raise RequestError(f"tool_choice must name one of {', '.join(names)}, got {name!r:.100}", "tool_choice")
    return ToolPlan([tool for tool in known if tool.name == name], tools, is_forced=True, limit=1)


def _named(choice: Any) -> str | None:
    if choice == "required":
        return None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) and len(choice) == 2 else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be none, auto, required or {"type": "function", "function": {"name": …}}, '
            f"got {choice!r:.100}", "tool_choice",
        )  # fmt: skip
    return name


def _read_tools(tools: list[dict[str, Any]]) -> list[Tool]:
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools must hold at most {MAX_TOOLS}, got {len(tools)}", "tools")
    read = [_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    seen: set[str] = set()
    for tool in read:
        if tool.name in seen:
            raise RequestError(f"{tool.place}.function.name is there twice: {tool.name}", f"{tool.place}.function.name")
        seen.add(tool.name)
    return read


def _read_tool(tool: Mapping[str, Any], place: str) -> Tool:
    if tool.get("type") != "function":
        raise RequestError(f"{place}.type must be function, got {tool.get('type')!r:.100}", f"{place}.type")
    function = tool.get("function")
    where = f"{place}.function"
    if not isinstance(function, dict) or set(tool) != {"type", "function"}:
        raise RequestError(f"{place} must have the fields type and function alone, got {tool!r:.100}", where)
    unknown = [name for name in function if name not in _FUNCTION_FIELDS]
    if unknown:
        raise RequestError(f"{where} has no field {unknown[0]!r:.100}", where)
    name, strict = function.get("name"), function.get("strict")
    parameters = function.get("parameters")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise RequestError(f"{where}.name must be 1 to 64 letters, digits, - or _, got {name!r:.100}", f"{where}.name")
    if not isinstance(function.get("description"), str | None):
        raise RequestError(f"{where}.description must be text", f"{where}.description")
    if not isinstance(strict, bool | None):
        raise RequestError(f"{where}.strict must be true or false, got {strict!r:.100}", f"{where}.strict")
    if parameters is None:
        parameters = {"properties": {}}
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        raise RequestError(
            f"{where}.parameters must be the JSON schema of an object, got {parameters!r:.100}", f"{where}.parameters"
        )
    return Tool(name, {"type": "object"} | parameters, bool(strict), place)
