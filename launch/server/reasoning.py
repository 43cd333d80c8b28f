"""Splits an answer into what a model thought and what it says, while it arrives; knows no request and no template."""

from __future__ import annotations

from typing import Literal, NamedTuple

from launch.server.tool_calls import held_back

OPEN, CLOSE = "<think>", "</think>"


class Part(NamedTuple):
    """Text of one of the two kinds."""

    kind: Literal["reasoning_content", "content"]
    text: str


class ThinkSplitter:
    """`<think>…</think>` at the start of an answer is reasoning, without the whitespace around it; the rest is content.

    Args:
        begun: the prompt has opened the tag already.
    """

    def __init__(self, begun: bool) -> None:
        self._state: Literal["before", "inside", "behind", "content"] = "inside" if begun else "before"
        self._text = ""  # not told of yet
        self._said = False  # whether any reasoning was told

    def feed(self, text: str, last: bool) -> list[Part]:
        """What further text adds. After `last` nothing is held back."""
        self._text += text
        parts: list[Part] = []
        if self._state == "before":
            self._before(last)
        if self._state == "inside":
            self._inside(parts, last)
        if self._state == "behind":
            self._text = self._text.lstrip()
            if self._text:
                self._state = "content"
        if self._state == "content" and self._text:
            parts.append(Part("content", self._text))
            self._text = ""
        return parts

    def _before(self, last: bool) -> None:
        rest = self._text.lstrip()
        if rest.startswith(OPEN):
            self._state, self._text = "inside", rest[len(OPEN) :]
        elif last or not OPEN.startswith(rest):
            self._state = "content"

    def _inside(self, parts: list[Part], last: bool) -> None:
        # A prompt may open the tag and the model open it again.
        if not self._said:
            self._text = self._text.lstrip()
            if not last and self._text and OPEN.startswith(self._text):
                return
            self._text = self._text.removeprefix(OPEN).lstrip()
        thought, tag, rest = self._text.partition(CLOSE)
        if not tag and not last:
            thought = thought[: len(thought) - held_back(thought, CLOSE)]
        thought = thought.rstrip()  # whitespace is reasoning once more of it follows
        if thought:
            self._said = True
            parts.append(Part("reasoning_content", thought))
        if tag:
            self._state, self._text = "behind", rest
        else:
            self._text = "" if last else self._text[len(thought) :]
