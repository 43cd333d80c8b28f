"""Reads the text of one chat answer into OpenAI's parts: reasoning, content and tool calls; knows no engine.

The same reader serves a whole answer and a stream, so that both say the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launch.server.reasoning import Part, ThinkSplitter
from launch.server.tool_calls import CallDelta, ToolParser

Delta = dict[str, Any]
# Makes the reader of one choice; the argument says whether calls are told before they are complete.
ReaderFactory = Callable[[bool], "ChatReader"]


class ChatReader:
    """One choice of an answer.

    Args:
        splitter: finds reasoning; None: there is none.
        parser: finds tool calls in what is not reasoning; None: there are none.
        show_reasoning: false leaves the reasoning out.
        num_echoed: characters in front which repeat the prompt and are content as they are.
    """

    def __init__(
        self,
        splitter: ThinkSplitter | None = None,
        parser: ToolParser | None = None,
        show_reasoning: bool = True,
        num_echoed: int = 0,
    ) -> None:
        self._splitter, self._parser = splitter, parser
        self._show_reasoning, self._num_echoed = show_reasoning, num_echoed
        self.has_calls = False

    def feed(self, text: str, last: bool) -> list[Delta]:
        """What further text adds, each a `delta` with one field. After `last` nothing is held back."""
        deltas: list[Delta] = []
        if self._num_echoed:
            echoed, text = text[: self._num_echoed], text[self._num_echoed :]
            self._num_echoed -= len(echoed)
            _add_text(deltas, "content", echoed)
        parts = [Part("content", text)] if self._splitter is None else self._splitter.feed(text, last)
        for part in parts:
            if part.kind == "content" and self._parser is not None:
                self._add_parsed(deltas, self._parser.feed(part.text, False))
            elif part.kind == "content" or self._show_reasoning:
                _add_text(deltas, part.kind, part.text)
        if last and self._parser is not None:
            self._add_parsed(deltas, self._parser.feed("", True))
        return deltas

    def _add_parsed(self, deltas: list[Delta], found: list[str | CallDelta]) -> None:
        for each in found:
            if isinstance(each, str):
                _add_text(deltas, "content", each)
            else:
                self.has_calls = True
                deltas.append({"tool_calls": [_call_delta(each)]})

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's reason for an end: an answer that calls a tool ended for that, unless it was cut off."""
        return "tool_calls" if reason == "stop" and self.has_calls else reason


def message_of(deltas: list[Delta]) -> dict[str, Any]:
    """The deltas of a whole answer as one message."""
    content = "".join([delta.get("content", "") for delta in deltas])
    reasoning = "".join([delta.get("reasoning_content", "") for delta in deltas])
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if (reasoning or calls) and not content:
        message["content"] = None
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _add_text(deltas: list[Delta], name: str, text: str) -> None:
    if not text:
        return
    if deltas and name in deltas[-1]:
        deltas[-1][name] += text
    else:
        deltas.append({name: text})


def _call_delta(part: CallDelta) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}
