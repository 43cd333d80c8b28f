"""Tools, reasoning and template variables over HTTP: what reaches the template and the engine, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import llguidance
import pytest
import tokenizers

from configs.errors import RequestError
from launch.server.tools import plan_tools
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.launch import chat_templates
from tests.launch.fake_engine import FakeEngine
from tests.launch.http_answers import HI, client_of, error_of, events_of

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "its name ::= as written"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of today", "parameters": PARAMETERS}}
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
PATH = "/v1/chat/completions"


def ask(**fields: Any) -> dict[str, Any]:
    return HI | {"tools": [WEATHER, NOW]} | fields


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    engine = FakeEngine(tmp_path, chat_templates.THINKING, max_model_len=2048)
    engine.answer = CALL
    return engine


def prompt_of(engine: FakeEngine) -> str:
    assert engine.tokenizer is not None
    return engine.tokenizer.decode(engine.prompts[-1], skip_special_tokens=False)


async def test_a_call_is_told_in_openais_shape(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        body = (await client.post(PATH, json=ask())).json()
        (choice,) = body["choices"]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        assert call["type"] == "function"
        assert call["id"].startswith("call_")
        assert call["function"] == {"name": "weather", "arguments": '{"city": "北京"}'}
        assert '"weather"' in prompt_of(engine)
        assert engine.params[-1].structured_outputs is None

        events = events_of(await client.post(PATH, json=ask(stream=True, n=2)))
        for index in (0, 1):
            choices = [each for event in events for each in event["choices"] if each["index"] == index]
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            calls = [each["delta"]["tool_calls"][0] for each in choices if "tool_calls" in each["delta"]]
            assert calls[0]["function"] == {"name": "weather", "arguments": ""}
            assert json.loads("".join(each["function"]["arguments"] for each in calls)) == {"city": "北京"}
            reasons = [each["finish_reason"] for each in choices if each["finish_reason"]]
            assert reasons == ["tool_calls"]


async def test_a_call_that_is_cut_off_is_told_as_far_as_it_came(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        whole = (await client.post(PATH, json=ask(max_tokens=50))).json()["choices"][0]
        (call,) = whole["message"]["tool_calls"]
        assert (whole["finish_reason"], call["function"]["name"]) == ("length", "weather")
        assert '{"city": "北京"}'.startswith(call["function"]["arguments"])
        events = events_of(await client.post(PATH, json=ask(max_tokens=50, stream=True)))
        choices = [each for event in events for each in event["choices"]]
        parts = [each["delta"]["tool_calls"][0]["function"] for each in choices if "tool_calls" in each["delta"]]
        assert "".join(part["arguments"] for part in parts) == call["function"]["arguments"] != ""
        assert choices[-1]["finish_reason"] == "length"


async def test_an_answer_without_a_call_is_an_answer(engine: FakeEngine) -> None:
    engine.answer = "It rains <in> 北京."
    async with client_of(engine) as client:
        choice = (await client.post(PATH, json=ask(logprobs=True, top_logprobs=1))).json()["choices"][0]
        assert (choice["message"], choice["finish_reason"]) == (
            {"role": "assistant", "content": engine.answer},
            "stop",
        )
        events = events_of(await client.post(PATH, json=ask(stream=True, logprobs=True)))
        text = "".join(each["delta"].get("content", "") for event in events for each in event["choices"])
        assert text == engine.answer
        told = [each["logprobs"]["content"] for event in events for each in event["choices"] if each["logprobs"]]
        assert sum(map(len, told)) == len(choice["logprobs"]["content"])


async def test_tools_that_may_not_be_called_are_not_shown(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        choice = (await client.post(PATH, json=ask(tool_choice="none"))).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": CALL}
        assert "weather" not in prompt_of(engine)
        first = (await client.post(PATH, json=ask(parallel_tool_calls=False))).json()["choices"][0]
        engine.answer = f"{CALL}\n{CALL}"
        assert len((await client.post(PATH, json=ask())).json()["choices"][0]["message"]["tool_calls"]) == 2
        one = (await client.post(PATH, json=ask(parallel_tool_calls=False))).json()["choices"][0]
        assert len(one["message"]["tool_calls"]) == len(first["message"]["tool_calls"]) == 1


async def test_calls_and_their_results_reach_the_template(engine: FakeEngine) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "x"}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "which?"},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "rain"}]},
    ]
    async with client_of(engine) as client:
        assert (await client.post(PATH, json={"messages": messages, "tools": [WEATHER]})).status_code == 200
    assert '(thought: which?)<tool_call>weather {"city": "x"}</tool_call><|im_end|>' in prompt_of(engine)
    assert "<|im_start|>tool\nrain<|im_end|>" in prompt_of(engine)


@pytest.mark.parametrize(
    ("call", "param"),
    [
        (5, "messages[0].tool_calls[0]"),
        ({"type": "custom", "function": {}}, "messages[0].tool_calls[0]"),
        ({"function": {"name": 5}}, "messages[0].tool_calls[0].function.name"),
        ({"function": {"name": "a", "arguments": "{"}}, "messages[0].tool_calls[0].function.arguments"),
        ({"function": {"name": "a", "arguments": "[1]"}}, "messages[0].tool_calls[0].function.arguments"),
        ({"function": {"name": "a", "mood": 1}}, "messages[0].tool_calls[0].function.mood"),
        ({"id": 5, "function": {"name": "a"}}, "messages[0].tool_calls[0].id"),
    ],
)  # fmt: skip
async def test_a_malformed_call_in_the_history_is_a_400(engine: FakeEngine, call: object, param: str) -> None:
    async with client_of(engine) as client:
        body = {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
        assert error_of(await client.post(PATH, json=body), 400)["param"] == param


def function(**changes: Any) -> dict[str, Any]:
    return {"tools": [{"type": "function", "function": {"name": "a"} | changes}]}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [WEATHER, NOW, WEATHER]}, "tools[2].function.name"),
        ({"tools": [NOW | {"extra": 1}]}, "tools[0].function"),
        ({"tools": [WEATHER] * 129}, "tools"),
        (function(name="a b"), "tools[0].function.name"),
        (function(extra=1), "tools[0].function"),
        (function(description=5), "tools[0].function.description"),
        (function(strict="yes"), "tools[0].function.strict"),
        (function(parameters=[]), "tools[0].function.parameters"),
        (function(parameters={"type": "string"}), "tools[0].function.parameters"),
        (function(strict=True, parameters={"a": "x" * 70000}), "tools[0].function.parameters"),
        ({"tool_choice": "often"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "gone"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)  # fmt: skip
async def test_what_cannot_be_served_is_a_400_that_names_it(
    engine: FakeEngine, fields: dict[str, Any], param: str
) -> None:
    async with client_of(engine) as client:
        for stream in (False, True):
            assert error_of(await client.post(PATH, json=ask(stream=stream) | fields), 400)["param"] == param


async def test_a_template_or_a_server_without_tools_refuses_them(tmp_path: Path) -> None:
    for name, template, settings in (
        ("plain", None, {}),
        ("forced", None, {"tool_call_parser": "hermes"}),
        ("other", "{{ messages[0].content }}{% for t in tools or [] %}{{ t }}{% endfor %}", {}),
        ("off", chat_templates.TOOLS, {"tool_call_parser": "none"}),
    ):
        engine = FakeEngine(tmp_path / name, template, **settings)
        async with client_of(engine) as client:
            assert error_of(await client.post(PATH, json=ask()), 400)["param"] == "tools"
            assert (await client.post(PATH, json=ask(tool_choice="none"))).status_code == 200


def test_forced_and_strict_calls_are_grammars_that_llguidance_takes(engine: FakeEngine) -> None:
    assert engine.config.tokenizer_file is not None
    tokenizer = llguidance.LLTokenizer(Path(engine.config.tokenizer_file).read_text())

    def accepts(form: StructuredOutputsParams, text: str) -> bool:
        matcher = llguidance.LLMatcher(tokenizer, form.to_grammar())
        assert not matcher.is_error(), matcher.get_error()
        ids = tokenizer.tokenize_str(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    def form(choice: object, strict: bool = False, parallel: bool = True, **more: Any) -> StructuredOutputsParams:
        tools = [WEATHER | {"function": WEATHER["function"] | {"strict": strict}}, NOW]  # type: ignore[operator]
        grammar = plan_tools(tools, choice, parallel).grammar()
        assert grammar is not None
        return StructuredOutputsParams(grammar=grammar, **more)

    wrong, now = CALL.replace("city", "town"), '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("required", named):
        assert accepts(form(choice), CALL)
        assert not accepts(form(choice), wrong)
        assert not accepts(form(choice), "text")
    assert accepts(form("required"), f"{CALL}\n{now}")
    assert not accepts(form("required", parallel=False), f"{CALL}\n{now}")
    assert not accepts(form(named), now)
    for text, is_good in (("text", True), (f"so {CALL} and {now}.", True), (f"so {wrong}", False), ("", True)):
        assert accepts(form("auto", strict=True), text) == is_good, text
    assert accepts(form("required", reasoning="optional"), f"<think>well</think>\n\n{CALL}")
    assert accepts(form("required", reasoning="optional"), CALL)
    assert accepts(form("required", reasoning="open"), f"well</think>\n\n{CALL}")
    assert not accepts(form("required", reasoning="open"), CALL)


def test_a_grammar_takes_tags_that_are_special_tokens(engine: FakeEngine) -> None:
    """Otherwise the token that the model was trained to begin a call with would be forbidden."""
    assert engine.config.tokenizer_file is not None
    source = tokenizers.Tokenizer.from_file(str(engine.config.tokenizer_file))
    source.add_special_tokens(["<tool_call>", "</tool_call>"])
    tokenizer = llguidance.LLTokenizer(source.to_str())
    strict = WEATHER | {"function": WEATHER["function"] | {"strict": True}}  # type: ignore[operator]
    for choice, text, is_good in (
        ("required", CALL, True),
        ("required", CALL + "\n" + CALL, True),
        ("required", CALL.replace("city", "town"), False),
        ("auto", f"so {CALL} and {CALL}.", True),
        ("auto", "text", True),
        ("auto", CALL.replace("city", "town"), False),
    ):
        grammar = plan_tools([strict], choice, None).grammar(tags_are_tokens=True)
        matcher = llguidance.LLMatcher(tokenizer, StructuredOutputsParams(grammar=grammar).to_grammar())
        assert not matcher.is_error(), matcher.get_error()
        ids = source.encode(text, add_special_tokens=False).ids
        assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == is_good, (choice, text)


async def test_special_tags_stay_in_the_text(tmp_path: Path) -> None:
    special = {"extra_special_tokens": ["<tool_call>", "</tool_call>", "<think>", "</think>"]}
    engine = FakeEngine(tmp_path, chat_templates.THINKING, special, max_model_len=2048)
    engine.answer = f"<think>hm</think>{CALL}"
    async with client_of(engine) as client:
        message = (await client.post(PATH, json=ask())).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", None)
        assert len(message["tool_calls"]) == 1
        engine.answer = "{}"
        form = {"response_format": {"type": "json_object"}}
        message = (await client.post(PATH, json=HI | form)).json()["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "{}"}
        asked = engine.params[-1].structured_outputs
        assert isinstance(asked, StructuredOutputsParams)
        assert asked.reasoning is None


async def test_a_form_waits_until_the_model_has_thought(tmp_path: Path, engine: FakeEngine) -> None:
    form = {"response_format": {"type": "json_object"}}
    named = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    async with client_of(engine) as client:
        for fields in (HI | form, ask(**named)):
            for switch, reasoning in (({}, "optional"), ({"chat_template_kwargs": {"enable_thinking": False}}, None)):
                response = await client.post(PATH, json=fields | switch)
                assert response.status_code == 200, response.text
                asked = engine.params[-1].structured_outputs
                assert isinstance(asked, StructuredOutputsParams)
                assert asked.reasoning == reasoning
        engine.raise_at_once = RequestError("structured_outputs.grammar is odd", "structured_outputs")
        assert error_of(await client.post(PATH, json=ask(**named)), 400)["message"] == "tools is odd"
    opened = FakeEngine(tmp_path / "open", chat_templates.OPEN_THINKING)
    async with client_of(opened) as client:
        await client.post(PATH, json=HI | form)
        asked = opened.params[-1].structured_outputs
        assert isinstance(asked, StructuredOutputsParams)
        assert asked.reasoning == "open"


@pytest.mark.parametrize("stream", [False, True])
async def test_reasoning_is_a_field_of_its_own(tmp_path: Path, engine: FakeEngine, stream: bool) -> None:
    async def told(client: httpx.AsyncClient, **fields: Any) -> tuple[str, str]:
        response = await client.post(PATH, json=HI | {"stream": stream} | fields)
        if not stream:
            parts = [response.json()["choices"][0]["message"]]
        else:
            parts = [each["delta"] for event in events_of(response) for each in event["choices"]]
        names = ("reasoning_content", "content")
        thought, said = ("".join(part.get(name) or "" for part in parts) for name in names)
        return thought, said

    engine.answer = "<think>\nhm, 北京\n</think>\n\nParis"
    async with client_of(engine) as client:
        assert await told(client) == ("hm, 北京", "Paris")
        assert await told(client, include_reasoning=False) == ("", "Paris")
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        assert await told(client, **off) == ("", engine.answer)
        assert prompt_of(engine).endswith("</think>\n\n")
        assert await told(client, reasoning_effort="none") == ("", engine.answer)
    for name, settings, expected in (
        ("open", {}, ("hm", "Paris")),
        ("none", {"reasoning_parser": "none"}, ("", "hm</think>Paris")),
    ):
        opened = FakeEngine(tmp_path / name, chat_templates.OPEN_THINKING, **settings)
        opened.answer = "hm</think>Paris"
        async with client_of(opened) as client:
            assert await told(client) == expected
    always = FakeEngine(tmp_path / "always", reasoning_parser="think")
    always.answer = engine.answer
    async with client_of(always) as client:
        assert await told(client) == ("hm, 北京", "Paris")


async def test_the_last_message_can_be_continued(engine: FakeEngine) -> None:
    messages = [*HI["messages"], {"role": "assistant", "content": " The capital is "}]
    async with client_of(engine) as client:
        fields = {"messages": messages, "continue_final_message": True}
        engine.answer = "Paris"
        response = await client.post(PATH, json=fields | {"echo": True})
        assert response.json()["choices"][0]["message"]["content"] == " The capital is Paris"
        assert prompt_of(engine).endswith("<|im_start|>assistant\n The capital is ")
        tokens = (await client.post("/tokenize", json=fields)).json()["tokens"]
        assert tokens == engine.prompts[-1]
        shown = (await client.post("/tokenize", json=HI | {"tools": [NOW]})).json()["tokens"]
        assert len(shown) > len((await client.post("/tokenize", json=HI)).json()["tokens"])
        closed = {"messages": messages, "add_generation_prompt": False}
        await client.post(PATH, json=closed)
        assert prompt_of(engine).endswith("<|im_end|>\n")


def test_the_schema_of_the_tests_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(PARAMETERS)
