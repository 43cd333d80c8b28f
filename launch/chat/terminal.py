"""Reading messages and showing answers, on a terminal or through pipes; knows no server and no conversation."""

from __future__ import annotations

import contextlib
import io
import sys

_PROMPT, _CONTINUED = "> ", "… "
_QUOTES = '"""'
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# Control characters but for the newline and the tab: on a terminal they could do more than be seen.
_HARMLESS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


class Terminal:
    """Standard input and output. `is_interactive`: a person types, and is shown prompts and notes."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty()
        self._shows_to_terminal = sys.stdout.isatty()
        self._is_thinking = False
        self._column_is_0 = True
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a byte that is no text is no reason to end
        if self.is_interactive and self._shows_to_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - `input` then edits lines and recalls those typed before

    # -- reading ------------------------------------------------------------------------------------------------

    def read_message(self) -> str | None:
        r"""One message, of several lines if they end in \ or stand between quotes; None when there are no more.

        Raises KeyboardInterrupt at Ctrl-C; what was typed of the message is forgotten.
        """
        line = self._read_line(_PROMPT)
        if line is None:
            return None
        if line.lstrip().startswith(_QUOTES):
            return self._read_quoted(line.lstrip().removeprefix(_QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            following = self._read_line(_CONTINUED)
            if following is None:
                break
            lines.append(following)
        return "\n".join(lines)

    def _read_quoted(self, first: str) -> str:
        lines = [first]
        while not lines[-1].rstrip().endswith(_QUOTES):
            following = self._read_line(_CONTINUED)
            if following is None:
                return "\n".join(lines)
            lines.append(following)
        lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
        return "\n".join(lines).strip("\n")

    def _read_line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            line = sys.stdin.readline()
            return line.removesuffix("\n") if line else None
        try:
            return input(prompt if self._shows_to_terminal else "")
        except EOFError:
            if self._shows_to_terminal:
                print()
            return None

    # -- showing ------------------------------------------------------------------------------------------------

    def show(self, text: str, thoughts: str) -> None:
        """Show a piece of an answer. Thoughts are dim on a terminal, and left out elsewhere."""
        if self._shows_to_terminal:
            text, thoughts = text.translate(_HARMLESS), thoughts.translate(_HARMLESS)
            if thoughts:
                self._write(("" if self._is_thinking else _DIM) + thoughts)
                self._is_thinking = True
        if text:
            self._end_thoughts()
            self._write(text)

    def flush(self) -> None:
        """Make what was shown visible."""
        sys.stdout.flush()

    def end_answer(self) -> None:
        """End the line, if there is one to end."""
        self._end_thoughts(with_line=False)
        if not self._column_is_0:
            self._write("\n")
        self.flush()

    def note(self, text: str, new_line: bool = False) -> None:
        """Say something that is no answer."""
        self.tell(("\n" if new_line else "") + f"({text})")

    def tell(self, text: str) -> None:
        """Print lines among the answers for a person, on standard error for a program."""
        print(text, file=sys.stdout if self.is_interactive else sys.stderr, flush=True)

    def _end_thoughts(self, with_line: bool = True) -> None:
        if self._is_thinking:
            self._is_thinking = False
            self._write(_PLAIN + ("\n" if with_line and not self._column_is_0 else ""))

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        self._column_is_0 = text.endswith("\n")
