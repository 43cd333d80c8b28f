"""Checks the messages of a conversation and makes them what chat templates know; knows no template and no route."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from configs.errors import RequestError
from launch.server.schema import ANYTHING, refuse_unsupported

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
# As in `schema.NEUTRAL`.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "parsed": (ANYTHING,),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
_TEXTS = ("name", "tool_call_id")
_ASSISTANTS = ("reasoning_content", "reasoning", "tool_calls")


def repeated_message(messages: list[dict[str, Any]], echo: bool | None) -> str:
    """What `echo` puts in front of the answer to a conversation: a last message of the assistant's, as in vLLM."""
    return str(messages[-1]["content"]) if echo and messages[-1]["role"] == "assistant" else ""


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
    for name in _TEXTS:
        if message.get(name) is not None:
            taken[name] = _text(message[name], f"{where}.{name}")
    known = {"role", "content", *_TEXTS}
    if role == "assistant":
        known.update(_ASSISTANTS)
        for name in ("reasoning_content", "reasoning"):
            if message.get(name) is not None:
                taken["reasoning_content"] = _text(message[name], f"{where}.{name}")
        if message.get("tool_calls"):
            taken["tool_calls"] = _tool_calls(message["tool_calls"], f"{where}.tool_calls")
    refuse_unsupported(
        {name: value for name, value in message.items() if name not in known}, _NEUTRAL, prefix=f"{where}."
    )
    return taken


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{where} must be a string, got {value!r:.100}", where, "invalid_type")
    return value


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls as templates know them: the arguments are an object and no longer its JSON text."""
    if not isinstance(calls, list):
        raise RequestError(f"{where} must be a list of calls, got {calls!r:.100}", where, "invalid_type")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) and call.get("type", "function") == "function" else None
    if not isinstance(function, dict):
        raise RequestError(f"{where} must be a call of type function, got {call!r:.100}", where, "invalid_type")
    taken: dict[str, Any] = {"type": "function"}
    if call.get("id") is not None:
        taken["id"] = _text(call["id"], f"{where}.id")
    name = _text(function.get("name"), f"{where}.function.name")
    taken["function"] = {"name": name, "arguments": _arguments(function, f"{where}.function.arguments")}
    refuse_unsupported(
        {name: value for name, value in call.items() if name not in ("id", "type", "function", "index")},
        {}, prefix=f"{where}.",
    )  # fmt: skip
    refuse_unsupported(
        {name: value for name, value in function.items() if name not in ("name", "arguments")},
        {"parsed_arguments": (ANYTHING,)}, prefix=f"{where}.function.",
    )  # fmt: skip
    return taken


def _arguments(function: Mapping[str, Any], where: str) -> dict[str, Any]:
    text = function.get("arguments")
    try:
        arguments = json.loads(text or "{}") if isinstance(text, str | None) else text
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where} must be a JSON object as text, got {text!r:.100}", where)
    return arguments


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
