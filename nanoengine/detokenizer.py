"""Turns tokens into text while they arrive, and finds stop strings in it; knows no request and no transport.

Two ways to detokenise, behind one class: where the tokenizer's decoder is of a known byte form (byte-level BPE, or
byte fallback), each token has fixed bytes and the text is their UTF-8; otherwise a sliding window of tokens is
decoded again for each new one. The first is exact and costs a table look-up a token, the second works with anything.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

REPLACEMENT = "\ufffd"

# A character has at most 4 bytes, so at most 3 tokens of the prompt can belong to one that the prompt leaves open.
_OPEN_TOKENS = 3
_PROMPT_TAIL = 16  # tokens of the prompt that are searched for them, special ones among them
# The window's start: enough tokens of the prompt that a decoder which treats the first word differently is past it.
_WINDOW_TOKENS = 6
# Longest run of tokens that the window holds back. It ends a stream of nothing but U+FFFD, whose cost is quadratic.
_MAX_HELD_TOKENS = 64


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others are moved up behind U+0100, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(moved)}


_BYTE_OF_CHAR = _byte_of_char()


class TokenPieces(dict[int, "bytes | str"]):
    """What each token id adds to a text, filled as ids are met: raw bytes, or text that stands alone.

    `byte_fallback` says how the decoder counts the bytes of an incomplete character (see `_ByteStream`), and
    `strip_left` how many spaces it drops at the very start of a text.
    """

    def __init__(
        self,
        id_to_token: Callable[[int], str | None],
        convert: Callable[[str], bytes | str],
        byte_fallback: bool = False,
        strip_left: int = 0,
    ) -> None:
        super().__init__()
        self._id_to_token, self._convert = id_to_token, convert
        self.byte_fallback, self.strip_left = byte_fallback, strip_left

    def __missing__(self, token_id: int) -> bytes | str:
        token = self._id_to_token(token_id)
        # The decoders of the tokenizers library skip an id without a token (a model's padded vocabulary has such).
        piece = b"" if token is None else self._convert(token)
        self[token_id] = piece
        return piece

    @classmethod
    def from_decoder(cls, state: dict[str, Any] | None, id_to_token: Callable[[int], str | None]) -> TokenPieces | None:
        """Read the JSON state of a decoder of the tokenizers library; None when it is not of a known byte form."""
        if state is None:
            return None
        steps = state["decoders"] if state.get("type") == "Sequence" else [state]
        kinds = [step.get("type") for step in steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return cls(id_to_token, _byte_level_piece)
        replaced: list[tuple[str, str]] = []
        while steps and steps[0].get("type") == "Replace" and "String" in steps[0].get("pattern", {}):
            replaced.append((steps[0]["pattern"]["String"], steps[0]["content"]))
            steps = steps[1:]
        if [step.get("type") for step in steps[:2]] != ["ByteFallback", "Fuse"]:
            return None
        rest = steps[2:]
        if not rest:
            return cls(id_to_token, _byte_fallback(replaced), byte_fallback=True)
        strip = rest[0]
        if len(rest) == 1 and strip.get("type") == "Strip" and strip["content"] == " " and strip["stop"] == 0:
            return cls(id_to_token, _byte_fallback(replaced), byte_fallback=True, strip_left=strip["start"])
        return None


def _byte_level_piece(token: str) -> bytes:
    # A token with any character outside the table (an added token with a space, say) stands for itself.
    values = [_BYTE_OF_CHAR.get(char, -1) for char in token]
    return token.encode() if -1 in values else bytes(values)


def _byte_fallback(replaced: list[tuple[str, str]]) -> Callable[[str], bytes | str]:
    def convert(token: str) -> bytes | str:
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        for old, new in replaced:
            token = token.replace(old, new)
        return token

    return convert


class _SourceTokenizer(Protocol):
    """What a detokeniser asks of a tokenizer."""

    @property
    def pieces(self) -> TokenPieces | None: ...
    @property
    def special_token_ids(self) -> frozenset[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class IncrementalDetokenizer:
    """The text of one growing sequence of tokens.

    The increments, `finish` included, add up to what decoding all ids at once gives; no increment splits a character,
    and one that never becomes complete comes out as U+FFFD at the end. With a prompt, the text goes on where the
    prompt ended: a leading space stays, and a character that the prompt left open is completed. (Byte fallback with
    invalid UTF-8 is the one exception: decoding at once would spoil valid characters beside an invalid byte as well.)
    """

    def __init__(
        self, tokenizer: _SourceTokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._parts: list[str] = []
        self._stream: _ByteStream | _WindowStream
        if tokenizer.pieces is not None:
            skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
            self._stream = _ByteStream(tokenizer.pieces, skipped, prompt_token_ids)
        else:
            self._stream = _WindowStream(tokenizer, skip_special_tokens, prompt_token_ids)

    def append(self, token_ids: Iterable[int]) -> str:
        """Take more tokens; returns the text they complete, '' while a character is open."""
        new = self._stream.append(token_ids)
        self._parts.append(new)
        return new

    def finish(self) -> str:
        """No token follows: returns the rest, U+FFFD for a character that stayed open. Harmless twice."""
        new = self._stream.finish()
        self._parts.append(new)
        return new

    @property
    def text(self) -> str:
        """All increments so far, joined when somebody asks."""
        self._parts = ["".join(self._parts)]
        return self._parts[0]


class _ByteStream:
    """Joins the tokens' bytes and decodes them as UTF-8, one character after the other.

    Bytes that can become no character give one U+FFFD a broken sequence in byte-level decoding, one a byte in byte
    fallback, which is what the decoders of the tokenizers library do.
    """

    def __init__(self, pieces: TokenPieces, skipped: frozenset[int], prompt_token_ids: Sequence[int]) -> None:
        self._pieces, self._skipped = pieces, skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_left = 0
        self.append([token for token in prompt_token_ids[-_PROMPT_TAIL:] if token not in skipped][-_OPEN_TOKENS:])
        if pieces.strip_left and not any(pieces[token] for token in prompt_token_ids if token not in skipped):
            self._strip_left = pieces.strip_left

    def append(self, token_ids: Iterable[int]) -> str:
        pieces, skipped, decode = self._pieces, self._skipped, self._decoder.decode
        parts = []
        for token_id in token_ids:
            if token_id in skipped:
                continue
            piece = pieces[token_id]
            if isinstance(piece, bytes):
                parts.append(decode(piece))
            else:  # text stands alone and ends what was open
                parts.append(self._abandon())
                parts.append(piece)
        text = "".join(parts)
        return self._stripped(text) if self._strip_left else text

    def finish(self) -> str:
        return self._stripped(self._abandon())

    def _abandon(self) -> str:
        """Give up the character that is open, if one is."""
        if self._pieces.byte_fallback:
            num_bytes = len(self._decoder.getstate()[0])
            self._decoder.reset()
            return REPLACEMENT * num_bytes
        return self._decoder.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        kept = text.lstrip(" ")
        num_cut = min(len(text) - len(kept), self._strip_left)
        self._strip_left = 0 if kept else self._strip_left - num_cut
        return text[num_cut:]


class _WindowStream:
    """Decodes a short window twice, with and without the new tokens; the difference is the new text."""

    def __init__(self, tokenizer: _SourceTokenizer, skip_special_tokens: bool, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer, self._skip_special_tokens = tokenizer, skip_special_tokens
        self._window = list(prompt_token_ids[-_WINDOW_TOKENS:])
        self._num_sent = len(self._window)  # tokens of the window whose text was sent
        self._sent_text = self._decode(self._window).rstrip(REPLACEMENT)

    def append(self, token_ids: Iterable[int]) -> str:
        return "".join([self._append_one(token_id) for token_id in token_ids])

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, self._skip_special_tokens)

    def _append_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        is_open = text.endswith(REPLACEMENT) or len(text) <= len(self._sent_text)
        if is_open and len(self._window) - self._num_sent < _MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def finish(self) -> str:
        if self._num_sent == len(self._window):
            return ""
        return self._advance(self._decode(self._window))

    def _advance(self, text: str) -> str:
        new = text[len(self._sent_text) :]
        del self._window[: self._num_sent]
        self._num_sent = len(self._window)
        self._sent_text = self._decode(self._window)
        return new


class StopChecker:
    """Finds the first of several stop strings in a text that arrives in pieces, however it is cut.

    The first match is the one that is complete first; of those that end together, the longest. Text that may still
    become a stop string is held back, and nothing else is. (Knuth, Morris and Pratt's automaton for each string:
    the cost of a character does not depend on the strings' lengths.)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _failure_table(stop)) for stop in stops]
        self._states = [0] * len(self._stops)  # characters of each stop string that the text so far ends with
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take more text; returns what may be emitted, and the stop string once one is found (it is not emitted)."""
        if self.matched is not None:
            return "", self.matched
        if not self._stops:
            return text, None
        whole = self._held + text
        for position in range(len(self._held), len(whole)):
            found = self._advance(whole[position])
            if found is not None:
                self.matched, self._held = found, ""
                return whole[: position + 1 - len(found)], found
        emitted = len(whole) - max(self._states)
        self._held = whole[emitted:]
        return whole[:emitted], None

    def flush(self) -> str:
        """No text follows: returns what was held back."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._stops)
        return held

    def _advance(self, char: str) -> str | None:
        found = None
        for index, (stop, failure) in enumerate(self._stops):
            state = self._states[index]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                found = stop if found is None or len(stop) > len(found) else found
                state = failure[state - 1]
            self._states[index] = state
        return found


def _failure_table(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table


def decoder_state(decoder: Any) -> dict[str, Any] | None:
    """The JSON state of a decoder of the tokenizers library; None when there is none."""
    if decoder is None:
        return None
    state: dict[str, Any] = json.loads(decoder.__getstate__())
    return state
