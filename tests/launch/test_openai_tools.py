"""The openai package against a real uvicorn: tools, structured output and reasoning, whole, streamed and async."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from nanoengine.structured_outputs import StructuredOutputsParams
from tests.launch import chat_templates
from tests.launch.fake_engine import FakeEngine, served


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: str
    days: int = 1


CALL = '<tool_call>\n{"name": "Weather", "arguments": {"city": "北京", "days": 2}}\n</tool_call>'
TOOL = openai.pydantic_function_tool(Weather)
ASKED: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "Will it rain?"}]}


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    engine = FakeEngine(tmp_path, chat_templates.THINKING, max_model_len=2048)
    engine.answer = CALL
    return engine


@pytest.fixture
def client(engine: FakeEngine) -> Iterator[openai.OpenAI]:
    with served(engine) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_conversation_with_a_tool(engine: FakeEngine, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**ASKED, tools=[TOOL])
    message = answer.choices[0].message
    assert (answer.choices[0].finish_reason, message.content) == ("tool_calls", None)
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert call.type == "function"
    assert json.loads(call.function.arguments) == {"city": "北京", "days": 2}
    # What came back goes in again as it is, with the result behind it.
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    engine.answer = "It will rain."
    messages = [*ASKED["messages"], message, result]
    again = client.chat.completions.create(model="demo", messages=messages, tools=[TOOL])
    assert again.choices[0].message.content == "It will rain."
    assert again.choices[0].message.tool_calls is None
    assert engine.tokenizer is not None
    prompt = engine.tokenizer.decode(engine.prompts[-1])
    assert '<tool_call>Weather {"city": "北京", "days": 2}</tool_call>' in prompt
    assert "tool\nrain" in prompt


def test_calls_are_streamed_and_parsed(engine: FakeEngine, client: openai.OpenAI) -> None:
    engine.answer = f"<think>Which city?</think>\nLet me see.\n{CALL}\n{CALL.replace('北京', 'Paris')}"
    with client.chat.completions.stream(**ASKED, tools=[TOOL]) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    assert events.count("tool_calls.function.arguments.done") == 2
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "Let me see."
    assert final.message.tool_calls is not None
    parsed = [call.function.parsed_arguments for call in final.message.tool_calls]
    assert parsed == [Weather(city="北京", days=2), Weather(city="Paris", days=2)]
    whole = client.chat.completions.parse(**ASKED, tools=[TOOL]).choices[0].message
    assert whole.tool_calls is not None
    assert [call.function.parsed_arguments for call in whole.tool_calls] == parsed
    assert whole.model_extra is not None
    assert whole.model_extra["reasoning_content"] == "Which city?"
    thoughts = ""
    for chunk in client.chat.completions.create(**ASKED, tools=[TOOL], stream=True):
        thoughts += (chunk.choices[0].delta.model_extra or {}).get("reasoning_content", "")
    assert thoughts == "Which city?"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Weather"}}])
def test_a_call_can_be_forced(engine: FakeEngine, client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(**ASKED, tools=[TOOL], tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    form = engine.params[-1].structured_outputs
    assert isinstance(form, StructuredOutputsParams)
    assert form.grammar is not None
    assert "Weather" in form.grammar


def test_structured_output_is_parsed_into_a_model(engine: FakeEngine, client: openai.OpenAI) -> None:
    engine.answer = '{"city": "Paris", "days": 3}'
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    parsed = client.chat.completions.parse(**ASKED, response_format=Weather, extra_body=off).choices[0].message.parsed
    assert parsed == Weather(city="Paris", days=3)
    form = engine.params[-1].structured_outputs
    assert isinstance(form, StructuredOutputsParams)
    assert isinstance(form.json, str)
    assert set(json.loads(form.json)["properties"]) == {"city", "days"}
    with client.chat.completions.stream(**ASKED, response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


async def test_the_async_client_calls_tools_side_by_side(engine: FakeEngine) -> None:
    with served(engine) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:

            async def ask() -> str:
                arguments = ""
                async for chunk in await client.chat.completions.create(**ASKED, tools=[TOOL], stream=True):
                    for call in chunk.choices[0].delta.tool_calls or []:
                        arguments += (call.function and call.function.arguments) or ""
                return arguments

            assert {*await asyncio.gather(*[ask() for _ in range(8)])} == {'{"city": "北京", "days": 2}'}
            message = (await client.chat.completions.parse(**ASKED, tools=[TOOL])).choices[0].message
            assert message.tool_calls is not None


def test_what_is_not_implemented_is_asked_for_once(engine: FakeEngine, client: openai.OpenAI) -> None:
    with client.with_options(max_retries=2) as patient, pytest.raises(openai.InternalServerError) as refused:
        patient.embeddings.create(model="demo", input="a")
    assert (refused.value.status_code, refused.value.code) == (501, "not_implemented")
    assert refused.value.response.request.headers["x-stainless-retry-count"] == "0"


def test_tools_that_the_model_does_not_know_are_an_error(tmp_path: Path) -> None:
    with served(FakeEngine(tmp_path)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(**ASKED, tools=[TOOL])
        assert refused.value.param == "tools"
