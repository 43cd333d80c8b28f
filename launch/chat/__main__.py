"""A chat in the terminal, with a running server or one that it starts: `python -m launch.chat`; knows no engine.

What is typed goes to a server with OpenAI's API, ours or another, and the answer is shown as it comes. Ctrl-C stops an
answer (the server is told by hanging up), Ctrl-D leaves. With standard input from a file or a pipe, each message in it
is answered in turn: answers go to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

from configs.errors import ConfigError, NanoEngineError, RequestError, UnknownModelError
from launch import cli
from launch.chat.conversation import Answer, Conversation
from launch.chat.terminal import Terminal
from launch.client.api import ApiClient
from launch.client.connection import ClientError
from launch.options import OneLineParser, whole
from launch.tied_server import TiedServer
from nanoengine.sampling_params import SamplingParams

PROGRAM = "launch.chat"
_PATH = "/v1/chat/completions"
_HELP = """\
/system TEXT  give the model TEXT as its instructions and begin anew; without TEXT, no instructions
/reset        forget the conversation, keep the instructions
/help         show this
/exit         leave, as Ctrl-D does
Ctrl-C stops an answer. A line that ends in \\ goes on in the next one; so does everything between two \"\"\"."""
# Fields of the request, each an option that is sent only when it is given.
_SAMPLING: dict[str, tuple[type, str]] = {
    "temperature": (float, "0 always takes the likeliest token"),
    "top_p": (float, "keep the likeliest tokens that together reach this probability"),
    "top_k": (int, "keep so many of the likeliest tokens"),
    "min_p": (float, "drop tokens below this share of the likeliest one's probability"),
    "seed": (int, "the same seed gives the same answers"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 1 for a failure, 2 for settings that cannot be, 130 after Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        arguments, engine_options = _parse(sys.argv[1:] if argv is None else argv)
        return _run(arguments, engine_options)
    except NanoEngineError as error:
        print(f"{PROGRAM}: error: {' '.join(error.message.split())}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError | UnknownModelError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answers has gone
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End as by `sys.exit`, so that the server that was started here is stopped on the way out."""
    raise SystemExit(128 + number)


def make_parser() -> argparse.ArgumentParser:
    """The chat's own options; all others are the server's."""
    parser = OneLineParser(
        prog=f"python -m {PROGRAM}",
        description="Chat with a model in the terminal.",
        epilog="Without --base-url a server is started, which takes every other option of `python -m launch`.",
        allow_abbrev=False,
    )
    parser.add_argument("--base-url", help="address of a running server (default: start one)")
    parser.add_argument("--api-key", help="the key it wants (default: the environment's OPENAI_API_KEY)")
    parser.add_argument("--model", help="the model's name there (default: the first); for a server to start, its model")
    parser.add_argument("--system", default="", metavar="TEXT", help="the model's instructions")
    parser.add_argument("--max-tokens", type=whole(1), help="longest answer (default: as long as fits)")
    for name, (kind, words) in _SAMPLING.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=f"{words} (default: the server's)")
    parser.add_argument("--stats", action="store_true", help="tell tokens and speed after each answer")
    return parser


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The chat's options, and those of the server to start. Raises ConfigError."""
    arguments, engine_options = make_parser().parse_known_args(argv)
    try:
        SamplingParams(**{name: value for name in _SAMPLING if (value := getattr(arguments, name)) is not None})
    except RequestError as error:
        raise ConfigError(f"--{error.message.replace('_', '-')}", error.param) from None
    if arguments.base_url is not None:
        if engine_options:
            raise ConfigError(f"{engine_options[0]} is no option of the chat, and {arguments.base_url} runs already")
        return arguments, []
    given = [("--model", arguments.model), ("--api-key", arguments.api_key)]
    engine_options += [word for flag, value in given if value is not None for word in (flag, value)]
    cli.parse(engine_options).resolve()  # what is wrong with them is said before anything starts
    return arguments, engine_options


def _run(arguments: argparse.Namespace, engine_options: list[str]) -> int:
    with contextlib.ExitStack() as stack:
        server, url, key, model = None, arguments.base_url, arguments.api_key, arguments.model
        terminal = Terminal()
        if url is None:
            if terminal.is_interactive:
                terminal.note("starting a server …")
            server = stack.enter_context(TiedServer(engine_options))
            url, model = server.url, None
        else:
            key = key or os.environ.get("OPENAI_API_KEY") or None
        runner = stack.enter_context(asyncio.Runner())
        api = ApiClient(url, key)
        stack.callback(api.close)
        card = runner.run(api.model(model))
        return Chat(arguments, terminal, runner, api, card, server).talk()


class Chat:
    """One conversation. `talk` reads and answers until there is nothing more to read."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        terminal: Terminal,
        runner: asyncio.Runner,
        api: ApiClient,
        card: dict[str, Any],
        server: TiedServer | None,
    ) -> None:
        self._terminal, self._runner, self._api, self._server = terminal, runner, api, server
        self._conversation = Conversation(arguments.system)
        self._max_tokens, self._with_stats = arguments.max_tokens, arguments.stats
        self._model = str(card["id"])
        # Told by vLLM's server and ours.
        self._limit = (
            f"the model's {card['max_model_len']} tokens" if card.get("max_model_len") else "the model's limit"
        )
        self._fields = {name: value for name in _SAMPLING if (value := getattr(arguments, name)) is not None}
        if arguments.max_tokens is not None:
            self._fields["max_completion_tokens"] = arguments.max_tokens
        if arguments.stats:
            self._fields["stream_options"] = {"include_usage": True}

    def talk(self) -> int:
        """Returns the exit code: 1 when the server is lost, or when a message of a file could not be answered."""
        terminal = self._terminal
        if terminal.is_interactive:
            terminal.note(f"chatting with {self._model} at {self._api.where}; /help lists commands, Ctrl-D leaves")
        while True:
            try:
                message = terminal.read_message()
                if message is None:
                    return 0
                if command := Conversation.command_of(message):
                    if not self._obey(*command):
                        return 0
                elif message.strip() and not self._answer(message):
                    return 1
            except KeyboardInterrupt:
                if not terminal.is_interactive:
                    raise
                terminal.note("Ctrl-D or /exit leaves", new_line=True)

    def _obey(self, name: str, rest: str) -> bool:
        """Carry out a command; False when it says to leave."""
        note = self._terminal.note
        if name == "exit":
            return False
        if name == "reset":
            self._conversation.reset()
            note("the conversation is forgotten")
        elif name == "system":
            self._conversation = Conversation(rest)
            note("instructions set, the conversation begins anew" if rest else "no instructions any more")
        elif name == "help":
            self._terminal.tell(_HELP)
        else:
            note(f"there is no command /{name}; /help lists them")
        return True

    def _answer(self, message: str) -> bool:
        """Ask, and show the answer while it comes; False when there is no sense in going on."""
        answer = Answer()
        body = {"model": self._model, "messages": self._conversation.with_message(message), **self._fields}
        try:
            self._runner.run(self._stream(body, answer))
        except KeyboardInterrupt:
            self._terminal.end_answer()
            self._terminal.note("stopped")
            if not self._terminal.is_interactive:
                raise
        except ClientError as error:
            self._terminal.end_answer()
            return self._explain(error)
        else:
            self._terminal.end_answer()
            self._remark(answer)
        if answer.text:
            self._conversation.add(message, answer.text)
        return True

    async def _stream(self, body: dict[str, Any], answer: Answer) -> None:
        async with contextlib.aclosing(self._api.stream(_PATH, body)) as stream:
            async for chunks in stream:
                for chunk in chunks:
                    text, thoughts = answer.take(chunk)
                    self._terminal.show(text, thoughts)
                self._terminal.flush()

    def _explain(self, error: ClientError) -> bool:
        """Say why there is no answer; the message is forgotten. False when the chat cannot go on."""
        terminal = self._terminal
        if error.status == 400 and _is_about_length(error):
            terminal.note(f"the conversation does not fit into {self._limit}: /reset begins anew ({error.message})")
        else:
            terminal.note(f"no answer: {error.kind}: {error.message}")
        if self._server is not None and not self._server.is_alive:
            terminal.note("the server has ended")
            return False
        return terminal.is_interactive

    def _remark(self, answer: Answer) -> None:
        if answer.finish_reason == "length":
            limits = f"--max-tokens {self._max_tokens} or " if self._max_tokens is not None else ""
            self._terminal.note(f"cut off by {limits}{self._limit}")
        elif not answer.text:
            self._terminal.note("an answer without text")
        if self._with_stats:
            self._terminal.note(answer.stats())


def _is_about_length(error: ClientError) -> bool:
    """Whether it is the refusal of a conversation that is too long; ours, vLLM's and OpenAI's words differ."""
    said = f"{error.code} {error.message}".lower()
    return any(words in said for words in ("context_length", "context length", "max_model_len", "too long"))


if __name__ == "__main__":
    sys.exit(main())
