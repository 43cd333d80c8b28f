"""Finds tool calls in the text of an answer while it arrives; knows no request, no template and no transport.

A model writes a call in the form that its chat template taught it. Each form has a parser, named in `PARSERS`; what a
parser cannot read as a call of one of the tools stays text, so that nothing of an answer gets lost.
"""

from __future__ import annotations

import dataclasses
import json
import re
import uuid
from collections.abc import Callable, Collection
from typing import Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of the call number `index`: first its id and name, then pieces of its arguments, which are JSON text."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class ToolParser(Protocol):
    """Reads the text of one answer."""

    def feed(self, text: str, last: bool) -> list[str | CallDelta]:
        """What further text adds: text outside of calls, and parts of calls. After `last` nothing is held back."""
        ...


# Names of tools, whether calls are told of before they are complete, and how many calls there may be.
ParserFactory = Callable[[Collection[str], bool, int | None], ToolParser]


class HermesParser:
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes, Qwen2.5 and Qwen3 write it.

    Args:
        names: the tools that may be called.
        eager: tell the arguments while they arrive. A call whose JSON turns out to be malformed after its name was
            told stays a call; otherwise it is told as text.
        limit: calls beyond this number, and whatever follows, are dropped; None: no limit.
    """

    OPEN, CLOSE = "<tool_call>", "</tool_call>"
    _HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

    def __init__(self, names: Collection[str], eager: bool, limit: int | None = None) -> None:
        self._names, self._eager, self._limit = frozenset(names), eager, limit
        self._text = ""  # not told of yet; in a call all that stands behind its opening tag
        self._gap = ""  # the whitespace in front of the open call, which is text again if it is none
        self._call: _OpenCall | None = None
        self._num_calls = 0
        self._after_call = False
        self._has_said = False  # whether any text was told
        self._break = ""  # what stands between the texts before and behind calls

    def feed(self, text: str, last: bool) -> list[str | CallDelta]:
        """See `ToolParser`."""
        if self._num_calls == self._limit and self._call is None:
            return []
        self._text += text
        found: list[str | CallDelta] = []
        while self._step(found, last):
            pass
        return found

    def _step(self, found: list[str | CallDelta], last: bool) -> bool:
        """Take a part of the text. False when there is nothing to do before more arrives."""
        if self._num_calls == self._limit and self._call is None:
            self._text = ""
            return False
        if self._call is None:
            return self._outside(found, last)
        if self._call.closing:
            return self._close(last)
        return self._inside(self._call, found, last)

    # -- between calls ------------------------------------------------------------------------------------------

    def _outside(self, found: list[str | CallDelta], last: bool) -> bool:
        head, tag, rest = self._text.partition(self.OPEN)
        if not tag:
            head = head if last else head[: len(head) - held_back(head, self.OPEN)]
        said = head if last and not tag and not self._num_calls else head.rstrip()
        self._say(found, said)
        if tag:
            self._gap, self._text, self._call = head[len(said) :], rest, _OpenCall()
            return True
        self._text = "" if last else self._text[len(said) :]
        return False

    def _say(self, found: list[str | CallDelta], text: str) -> None:
        if self._after_call:
            text = text.lstrip()
            text = self._break + text if text else ""
        if text:
            self._after_call = False
            self._has_said = True
            found.append(text)

    # -- in a call ----------------------------------------------------------------------------------------------

    def _inside(self, call: _OpenCall, found: list[str | CallDelta], last: bool) -> bool:
        end = call.object.end(self._text)
        if end is None and not last and call.object.is_possible:
            if self._eager:
                self._tell_early(call, found)
            return False
        # Complete, cut off, or no JSON object at all.
        if call.told or (self._eager and end is None):
            self._tell_early(call, found)
        if not call.told:
            whole = self._read(self._text[:end]) if end is not None else None
            if whole is None:
                self._no_call(found)
                return True
            self._begin(found, whole[0])
            found.append(CallDelta(self._num_calls, whole[1]))
        self._text = "" if end is None else self._text[end:]
        self._num_calls += 1
        call.closing = True
        return True

    def _tell_early(self, call: _OpenCall, found: list[str | CallDelta]) -> None:
        """Tell the name as soon as it is known, and as much of the arguments as has arrived."""
        if not call.told:
            head = self._HEAD.match(self._text)
            name = None if head is None else _loads(head[1])
            if head is None or name not in self._names:
                return
            assert isinstance(name, str)
            self._begin(found, name)
            call.told = call.arguments.position = head.end()
        end = call.arguments.end(self._text)
        new = self._text[call.told : end]
        if new:
            found.append(CallDelta(self._num_calls, new))
            call.told += len(new)

    def _begin(self, found: list[str | CallDelta], name: str) -> None:
        found.append(CallDelta(self._num_calls, id=f"call_{uuid.uuid4().hex[:24]}", name=name))

    def _read(self, text: str) -> tuple[str, str] | None:
        """Name and arguments of a complete call, None if it is not one."""
        value = _loads(text)
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):  # some models encode them twice
            arguments = _loads(arguments)
        if not isinstance(arguments, dict):
            return None
        head = self._HEAD.match(text)
        if head is None:
            return value["name"], json.dumps(arguments, ensure_ascii=False)
        scan = _ObjectScan(head.end())
        return value["name"], text[head.end() : scan.end(text)]  # as it was written, which is what a stream tells

    def _no_call(self, found: list[str | CallDelta]) -> None:
        self._call = None
        self._after_call, self._has_said = False, True
        found.append(self._gap + self.OPEN)

    def _close(self, last: bool) -> bool:
        """Drop the closing tag, if one comes."""
        rest = self._text.lstrip()
        if not last and len(rest) < len(self.CLOSE) and self.CLOSE.startswith(rest):
            return False
        self._text = rest.removeprefix(self.CLOSE)
        if last and self.CLOSE.startswith(rest):
            self._text = ""
        self._call = None
        if self._has_said and (self._gap or not self._after_call):
            self._break = self._gap
        self._after_call = True
        return True


class _ObjectScan:
    """Where a JSON object that begins at `position`, whitespace aside, ends in a text that grows."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self.is_possible = True  # whether it can be an object
        self._depth = 0
        self._in_string = self._escaped = False
        self._end: int | None = None

    def end(self, text: str) -> int | None:
        """The place behind its last brace, None as long as that has not come."""
        while self._end is None and self.is_possible and self.position < len(text):
            self._take(text[self.position])
            self.position += 1
        return self._end

    def _take(self, char: str) -> None:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            elif char == '"':
                self._in_string = False
        elif char in "{[":
            self.is_possible = self._depth > 0 or char == "{"
            self._depth += 1
        elif self._depth == 0:
            self.is_possible = char.isspace()
        elif char == '"':
            self._in_string = True
        elif char in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._end = self.position + 1


class _OpenCall:
    """How far a call has been read. `told` counts the characters that need not be told again, 0: no name yet."""

    def __init__(self) -> None:
        self.object, self.arguments = _ObjectScan(), _ObjectScan()
        self.told = 0
        self.closing = False


def held_back(text: str, tag: str) -> int:
    """How many characters at the end of a text may be the beginning of a tag."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:size])), 0)


def _loads(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


PARSERS: dict[str, ParserFactory] = {"hermes": HermesParser}
# What a chat template that teaches this form contains.
MARKS = {"hermes": HermesParser.OPEN}
