"""Renders a model's chat template in a sandbox, as transformers does; knows no tokens and no tokenizer.

A template is data that comes with a model: it can neither reach Python's internals nor change what it is given.
The environment (whitespace, filters, functions, the `generation` tag) is that of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2 import nodes
from jinja2.parser import Parser

from configs.errors import RequestError, TokenizerError
from configs.model_files import read_text
from nanoengine import template_sandbox
from nanoengine.template_sandbox import BoundedEnvironment

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what the model wrote; only training asks where, so it is inert."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 reads a class attribute

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML, which a prompt is not.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(template: str) -> str:
    return datetime.datetime.now().strftime(template)


def _environment() -> BoundedEnvironment:
    extensions = [_GenerationTag, jinja2.ext.loopcontrols]
    environment = BoundedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.finish()
    return environment


class ChatTemplate:
    """A model's chat templates, compiled when first used. `templates` maps names to sources; `default` is the usual."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, jinja2.Template] = {}
        self._variables: set[str] | None = None  # of all templates, found when first asked for

    def __bool__(self) -> bool:
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text of a conversation, special tokens included.

        With `continue_final_message` it ends where the last message's content does, for the model to go on with.

        Raises:
            TokenizerError: there is no template, or it is malformed.
            RequestError: the template refuses these messages, or fails on them.
        """
        if not messages:
            raise RequestError("messages must hold at least one message", "messages")
        template = self._template(tools)
        # Clients send null for what they leave out; a template asks whether the key is there.
        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        # Behind the content stands what no client can know; the prompt is cut off there, whatever the template adds.
        mark = uuid.uuid4().hex if continue_final_message else ""
        if mark:
            chat[-1]["content"] = str(chat[-1].get("content", "")) + mark
        try:
            given = {
                "messages": chat,
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
            }
            text = template_sandbox.render(template, given | self._special_tokens | variables)
        except jinja2.exceptions.SecurityError as error:
            raise TokenizerError(f"the chat template is refused: {error}") from error
        except jinja2.TemplateError as error:
            raise RequestError(
                f"the chat template refuses the messages: {error.message or error}", "messages"
            ) from error
        except Exception as error:  # a template can raise anything that an expression can
            what = f"{type(error).__name__}: {error}"
            raise RequestError(f"the chat template fails on the messages: {what}", "messages") from error
        if mark and mark not in text:
            raise RequestError("the chat template leaves out the message that is to be continued", "messages")
        return text[: text.rindex(mark)] if mark else text

    def reads(self, name: str) -> bool:
        """Whether a template has a variable of this name."""
        if self._variables is None:
            environment = _environment()
            self._variables = set()
            for source in self._sources.values():
                with contextlib.suppress(jinja2.TemplateError):  # told where it is rendered
                    self._variables |= jinja2.meta.find_undeclared_variables(environment.parse(source))
        return name in self._variables

    def mentions(self, text: str) -> bool:
        """Whether a template contains a text."""
        return any(text in source for source in self._sources.values())

    def _template(self, tools: object) -> jinja2.Template:
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        if name not in self._sources:
            known = f" (it names {', '.join(sorted(self._sources))})" if self._sources else ""
            raise TokenizerError(f"the model has no default chat template{known}; send a completion prompt instead")
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except (jinja2.TemplateError, SyntaxError, RecursionError, ValueError, TypeError, MemoryError) as error:
                raise TokenizerError(f"the chat template is malformed: {error}") from error
        return self._compiled[name]


def load_templates(model_dir: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The templates of a model directory by name: its template files, or else those in tokenizer_config.json.

    Raises:
        TokenizerError: a template file cannot be read, or the setting is of another form.
    """
    files = {path.stem: path for path in sorted((model_dir / TEMPLATE_FOLDER).glob("*.jinja"))}
    if (model_dir / TEMPLATE_FILE).is_file():
        files["default"] = model_dir / TEMPLATE_FILE
    templates = {name: read_text(path, model_dir, TokenizerError) for name, path in files.items()}
    return templates or named_templates(tokenizer_config.get("chat_template"))


def named_templates(value: object) -> dict[str, str]:
    """Normalise `chat_template` of tokenizer_config.json: a string, a list of named ones, a mapping, or nothing."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in value.items()):
        return dict(value)
    raise TokenizerError("chat_template in tokenizer_config.json must be a string or a list of named templates")
