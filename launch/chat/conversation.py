"""A conversation and an answer on its way, as data; knows no server and no terminal."""

from __future__ import annotations

import re
import time
from typing import Any

Message = dict[str, str]

_COMMAND = re.compile(r"/([a-z]+)(?:\s+(.*))?", re.DOTALL)


class Conversation:
    """Instructions, and the messages that were exchanged under them."""

    def __init__(self, system: str = "") -> None:
        self._system = system
        self._messages: list[Message] = []

    @staticmethod
    def command_of(message: str) -> tuple[str, str] | None:
        """The name and the rest of a command; None for anything else, such as /etc/hosts."""
        match = _COMMAND.fullmatch(message.strip())
        return None if match is None else (match[1], (match[2] or "").strip())

    def with_message(self, text: str) -> list[Message]:
        """What a server is sent to answer `text`; the conversation itself does not change."""
        opening = [{"role": "system", "content": self._system}] if self._system else []
        return [*opening, *self._messages, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Remember a message and its answer."""
        self._messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def reset(self) -> None:
        """Forget the messages, keep the instructions."""
        self._messages.clear()


class Answer:
    """What has come of an answer, out of the chunks of a chat completion, and when."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._num_tokens: int | None = None
        self._sent = time.perf_counter()
        self._first: float | None = None
        self._last = self._sent

    def take(self, chunk: dict[str, Any]) -> tuple[str, str]:
        """What a chunk adds: text of the answer, and thoughts (which are no part of it)."""
        usage = chunk.get("usage") or {}
        self._num_tokens = usage.get("completion_tokens", self._num_tokens)
        choices = chunk.get("choices")
        if not choices:
            return "", ""
        delta = choices[0].get("delta") or {}
        self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
        text = delta.get("content") or ""
        thoughts = delta.get("reasoning_content") or delta.get("reasoning") or ""
        self._last = time.perf_counter()
        if self._first is None and (text or thoughts):
            self._first = self._last
        self.text += text
        return text, thoughts

    def stats(self) -> str:
        """Tokens, as the server counted them, and speed."""
        if self._num_tokens is None or self._first is None:
            return "the server does not say how many tokens it made"
        said = f"{self._num_tokens} tokens in {self._last - self._sent:.2f} s, the first after "
        said += f"{self._first - self._sent:.2f} s"
        decoding = self._last - self._first
        return said + (f", then {(self._num_tokens - 1) / decoding:.1f} tokens/s" if decoding else "")
