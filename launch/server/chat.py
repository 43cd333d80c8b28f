"""Makes a chat request ready for the engine: its prompt, its parameters, and how its answer is read; knows no route.

What the client asks for has to fit the model's chat template: tools that it does not show and variables that it does
not read are refused, since they would be ignored.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from configs.engine import ServerConfig
from configs.errors import RequestError
from launch.server import reasoning, tool_calls
from launch.server.chat_messages import chat_messages, repeated_message
from launch.server.chat_output import ChatReader, ReaderFactory
from launch.server.echo import Echo
from launch.server.response_format import AskedForm
from launch.server.schema import ChatCompletionRequest, TemplateFields, TokenizeRequest
from launch.server.tools import ToolPlan, plan_tools
from nanoengine.beam_params import BeamSearchParams
from nanoengine.chat_template import ChatTemplate
from nanoengine.sampling_params import SamplingParams
from nanoengine.structured_outputs import StructuredOutputsParams
from nanoengine.tokenizer import Tokenizer

Params = SamplingParams | BeamSearchParams

# Variables that a client may set, as the templates of the families name them, and their types.
TEMPLATE_VARIABLES: dict[str, type] = {
    "clear_thinking": bool,
    "custom_instructions": str,
    "date_string": str,
    "enable_thinking": bool,
    "model_identity": str,
    "preserve_thinking": bool,
    "reasoning_effort": str,
    "thinking": bool,
    "thinking_budget": int,
    "tools_in_user_message": bool,
}
_CALL_TAGS = (tool_calls.HermesParser.OPEN, tool_calls.HermesParser.CLOSE)
_THINKING_SWITCHES = ("enable_thinking", "thinking")


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat request, ready. `reader` makes what reads a choice; `forms_source` is the field that asked for a form."""

    prompt_token_ids: list[int]
    params: Params
    reader: ReaderFactory
    echo: Echo | None
    forms_source: str | None

    @contextlib.contextmanager
    def own_words(self) -> Iterator[None]:
        """Where the engine refuses the structured output, name the field that asked for it."""
        try:
            yield
        except RequestError as error:
            form = getattr(self.params, "structured_outputs", None)
            if self.forms_source is None or not isinstance(form, StructuredOutputsParams):
                raise
            raise AskedForm(form, self.forms_source).in_its_words(error) from None


def prepare_chat(body: ChatCompletionRequest, tokenizer: Tokenizer, config: ServerConfig, params: Params) -> Chat:
    """Render, tokenise and decide. Takes milliseconds for a long conversation, so call it off the event loop.

    Raises:
        RequestError: names the field at fault.
        TokenizerError: the model has no chat template.
    """
    plan = plan_tools(body.tools, body.tool_choice, body.parallel_tool_calls)
    template = tokenizer.chat_template
    parser = _tool_parser(plan, template, config)
    messages = chat_messages(body.messages)
    text = render(body, messages, tokenizer, plan.shown)
    thinks = _thinks(tokenizer, config)
    begun = thinks and text.rstrip().endswith(reasoning.OPEN)
    # A prompt that closes the tag itself switches reasoning off.
    splits = begun or (thinks and not text.rstrip().endswith(reasoning.CLOSE) and not body.continue_final_message)
    form, source = _form(body, plan, tokenizer)
    if form is not None:
        if splits and _is_special(tokenizer, reasoning.OPEN, reasoning.CLOSE):
            splits = False  # no text matches them, so the form holds from the first token on
        elif splits:
            form = dataclasses.replace(form, reasoning="open" if begun else "optional")
        if isinstance(params, BeamSearchParams):  # a response_format was refused before
            raise RequestError("use_beam_search does not go with tools that are forced or strict", "use_beam_search")
        params = dataclasses.replace(params, structured_outputs=form)
    tags = [*_CALL_TAGS] if plan.tools else []
    tags += [reasoning.OPEN, reasoning.CLOSE] if splits else []
    if body.skip_special_tokens is None and _is_special(tokenizer, *tags):
        params = dataclasses.replace(params, skip_special_tokens=False)  # else they are not in the text
    repeated = repeated_message(messages, body.echo)
    show_reasoning = body.include_reasoning is not False

    def reader(eager: bool) -> ChatReader:
        return ChatReader(
            reasoning.ThinkSplitter(begun) if splits else None,
            None if parser is None else parser(plan.names, eager, plan.limit),
            show_reasoning,
            len(repeated),
        )

    echo = Echo([repeated], tokenizer.token_text) if repeated else None
    return Chat(tokenizer.encode(text, add_special_tokens=False), params, reader, echo, source)


def tokenize_chat(body: TokenizeRequest, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a conversation; errors as in `prepare_chat`."""
    plan = plan_tools(body.tools, None, None)
    text = render(body, chat_messages(body.messages or []), tokenizer, plan.shown)
    return tokenizer.encode(text, bool(body.add_special_tokens))


def render(
    body: TemplateFields, messages: list[dict[str, Any]], tokenizer: Tokenizer, tools: list[dict[str, Any]] | None
) -> str:
    """The prompt text of a conversation.

    Raises:
        RequestError: a field cannot be served, because of its value or because the template ignores it.
        TokenizerError: the model has no chat template.
    """
    variables = _variables(body, tokenizer.chat_template)
    opens = not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt
    if body.continue_final_message:
        if opens:
            raise RequestError(
                "continue_final_message cannot be used together with add_generation_prompt", "continue_final_message"
            )
        if messages[-1]["role"] != "assistant" or messages[-1].get("tool_calls"):
            raise RequestError(
                "continue_final_message needs a last message of the assistant's, with text", "continue_final_message"
            )
        variables["continue_final_message"] = True
    text = tokenizer.render_chat(messages, opens, tools=tools, **variables)
    if tools and not _shows_tools(tokenizer, messages, opens, text, tools, variables):
        raise RequestError("the model's chat template ignores tools: this model was not taught to call any", "tools")
    return text


def _shows_tools(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    opens: bool,
    text: str,
    tools: list[dict[str, Any]],
    variables: dict[str, Any],
) -> bool:
    name = tools[0]["function"]["name"]
    return name in text and tokenizer.render_chat(messages, opens, **variables) != text


def _variables(body: TemplateFields, template: ChatTemplate) -> dict[str, Any]:
    """What the client sets of the template's variables."""
    given = dict(body.chat_template_kwargs or {})
    place = {name: f"chat_template_kwargs.{name}" for name in given}
    if body.reasoning_effort is not None:
        switches = [name for name in _THINKING_SWITCHES if template.reads(name)]
        if body.reasoning_effort == "none" and switches:
            given = dict.fromkeys(switches, False) | given
        else:
            given["reasoning_effort"], place["reasoning_effort"] = body.reasoning_effort, "reasoning_effort"
    return {name: value for name, value in given.items() if _is_read(name, value, place.get(name, name), template)}


def _is_read(name: str, value: Any, place: str, template: ChatTemplate) -> bool:
    """Whether a variable goes to the template. Raises RequestError for one that it would ignore."""
    kind = TEMPLATE_VARIABLES.get(name)
    if kind is None:
        known = ", ".join(TEMPLATE_VARIABLES)
        raise RequestError(f"{place:.120} is not supported; known are {known}", f"{place:.120}", "unsupported")
    if value is None:
        return False
    if type(value) is not kind:
        wanted = {bool: "true or false", int: "a whole number", str: "a string"}[kind]
        raise RequestError(f"{place} must be {wanted}, got {value!r:.100}", place, "invalid_type")
    if template.reads(name):
        return True
    if name in _THINKING_SWITCHES and value is False:
        return False  # a model that does not think is not switched off either
    raise RequestError(f"{place} is not read by the model's chat template", place, "unsupported")


def _tool_parser(plan: ToolPlan, template: ChatTemplate, config: ServerConfig) -> tool_calls.ParserFactory | None:
    if not plan.tools:
        return None
    name: str | None = config.tool_call_parser
    if name == "auto":
        name = next((each for each, mark in tool_calls.MARKS.items() if template.mentions(mark)), None)
        if name is None and not template.reads("tools"):
            raise RequestError(
                "the model's chat template ignores tools: this model was not taught to call any", "tools", "unsupported"
            )
    if name is None:
        known = ", ".join(tool_calls.PARSERS)
        raise RequestError(
            "the model's chat template teaches no form of tool calls that this server reads "
            f"(--tool-call-parser: {known})", "tools", "unsupported",
        )  # fmt: skip
    if name == "none":
        raise RequestError("this server reads no tool calls (--tool-call-parser none)", "tools", "unsupported")
    return tool_calls.PARSERS[name]


def _thinks(tokenizer: Tokenizer, config: ServerConfig) -> bool:
    if config.reasoning_parser != "auto":
        return config.reasoning_parser == "think"
    return tokenizer.chat_template.mentions(reasoning.OPEN) or tokenizer.token_id(reasoning.OPEN) is not None


def _form(
    body: ChatCompletionRequest, plan: ToolPlan, tokenizer: Tokenizer
) -> tuple[StructuredOutputsParams | None, str | None]:
    """The form of the answer, and the field that asks for it."""
    asked = body.asked_form()
    if asked is not None and plan.tools:
        raise RequestError(f"{asked.source} cannot be used together with tools", asked.source)
    if asked is not None:
        return asked.params, asked.source
    grammar = plan.grammar(_is_special(tokenizer, *_CALL_TAGS))
    if grammar is None:
        return None, None
    try:
        return StructuredOutputsParams(grammar=grammar), "tools"
    except RequestError as error:
        raise RequestError(error.message.replace(f"{error.param}.grammar", "tools"), "tools") from None


def _is_special(tokenizer: Tokenizer, *tags: str) -> bool:
    return any(tokenizer.token_id(tag) in tokenizer.special_token_ids for tag in tags)
