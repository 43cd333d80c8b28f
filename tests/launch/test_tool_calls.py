"""Tool calls and reasoning in a text that arrives in pieces of any size: nothing lost, nothing told twice."""

from __future__ import annotations

import json
import random

import pytest

from launch.server.chat_output import ChatReader, Delta, message_of
from launch.server.reasoning import ThinkSplitter
from launch.server.tool_calls import HermesParser

NAMES = ("get_weather", "add")
ARGUMENTS = '{"city": "Paris </tool_call> \\"{[", "n": [1, {}]}'
WEATHER = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
ADD = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
UNKNOWN = '<tool_call>{"name": "gone", "arguments": {}}</tool_call>'
ODD = '<tool_call>{"name": "add", "arguments": 5}</tool_call>'
BACKWARDS = '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>'


def read(text: str, sizes: list[int], eager: bool, limit: int | None = None, begun: bool | None = None) -> list[Delta]:
    splitter = None if begun is None else ThinkSplitter(begun)
    reader = ChatReader(splitter, HermesParser(NAMES, eager, limit))
    deltas: list[Delta] = []
    rest = text
    for size in sizes:
        deltas += reader.feed(rest[:size], False)
        rest = rest[size:]
    return deltas + reader.feed(rest, True)


def message(text: str, limit: int | None = None, begun: bool | None = None, seed: int = 0) -> dict[str, object]:
    """What a whole answer says, after a check that streams in pieces of all kinds say the same."""
    rng = random.Random(seed)
    whole = _plain(message_of(read(text, [], False, limit, begun)))
    for sizes in ([1] * len(text), [rng.randint(1, 9) for _ in text], [len(text)], []):
        streamed = _plain(message_of(read(text, sizes, True, limit, begun)))
        assert streamed == whole, sizes
    return whole


def _plain(shown: dict[str, object]) -> dict[str, object]:
    calls = shown.get("tool_calls")
    if isinstance(calls, list):
        assert len({call["id"] for call in calls}) == len(calls)
        shown["calls"] = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]
    return {name: value for name, value in shown.items() if name not in ("role", "tool_calls")}


PARIS = ("get_weather", {"city": 'Paris </tool_call> "{[', "n": [1, {}]})
ONE = ("add", {"a": 1})


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (WEATHER, None, [PARIS]),
        (WEATHER + "\n" + ADD, None, [PARIS, ONE]),
        (f"Let me see.\n\n{WEATHER}\n{ADD}\n", "Let me see.", [PARIS, ONE]),
        (f" a {ADD} b {ADD} c ", " a b c", [ONE, ONE]),
        (BACKWARDS, None, [ONE]),
        (ADD.removesuffix("</tool_call>"), None, [ONE]),
        (ADD.removesuffix("call>"), None, [ONE]),
        ('<tool_call>{"name": "add"}</tool_call>', None, [("add", {})]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', None, [ONE]),
        # Not calls: nothing of the text may be lost.
        ("plain text \n", "plain text \n", None),
        ("a <tool_call", "a <tool_call", None),
        ("a < b <tool <tool_calls", "a < b <tool <tool_calls", None),
        ("x \n<tool_call>nothing</tool_call> y", "x \n<tool_call>nothing</tool_call> y", None),
        (UNKNOWN, UNKNOWN, None),
        (ODD, ODD, None),
        ('<tool_call>{"name": }</tool_call>!', '<tool_call>{"name": }</tool_call>!', None),
        (f"<tool_call><tool_call>{ADD}", "<tool_call><tool_call>", [ONE]),
        ("<tool_call>", "<tool_call>", None),
        ('<tool_call>{"name": "ad', '<tool_call>{"name": "ad', None),
        ("", "", None),
    ],
)  # fmt: skip
def test_calls_are_found_and_other_text_stays(text: str, content: str | None, calls: object) -> None:
    shown = message(text)
    assert shown["content"] == content
    assert shown.get("calls") == calls


def test_no_more_calls_than_the_limit_are_told() -> None:
    assert message(f"{ADD}\n{WEATHER} and so on", limit=1) == {"content": None, "calls": [ONE]}


def test_a_streamed_call_begins_with_its_name_and_goes_on_with_its_arguments() -> None:
    deltas = [delta["tool_calls"][0] for delta in read(f"{WEATHER}\n{ADD}", [1] * 200, True)]
    first, second = (next(i for i, each in enumerate(deltas) if each["index"] == index) for index in (0, 1))
    for at, name in ((first, "get_weather"), (second, "add")):
        assert set(deltas[at]) == {"index", "id", "type", "function"}
        assert deltas[at]["function"] == {"name": name, "arguments": ""}
    assert second - first > 20, "the arguments arrive in pieces"
    assert all(set(each) == {"index", "function"} for at, each in enumerate(deltas) if at not in (first, second))


def test_a_call_that_breaks_off_in_its_arguments_is_text_at_once_and_a_call_in_a_stream() -> None:
    text = ADD[:45]
    assert message_of(read(text, [], False))["content"] == text
    (call,) = message_of(read(text, [1] * 50, True))["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a":'}


@pytest.mark.parametrize(
    ("text", "begun", "content", "thought"),
    [
        ("<think>\nhm\n\nwell\n</think>\n\nParis", False, "Paris", "hm\n\nwell"),
        ("hm\n</think>\n\nParis ", True, "Paris ", "hm"),
        ("<think>hm</think>Paris", True, "Paris", "hm"),
        ("Paris <think>no</think>", False, "Paris <think>no</think>", None),
        ("\n<thin", False, "\n<thin", None),
        ("<think>", False, "", None),
        ("<think>\n\n</think>\n\nParis", False, "Paris", None),
        ("cut <off </th", True, None, "cut <off </th"),
        (" Paris", False, " Paris", None),
        (f"<think>a <tool_call> b</think>\n{ADD}", False, None, "a <tool_call> b"),
    ],
)  # fmt: skip
def test_reasoning_is_split_off(text: str, begun: bool, content: str | None, thought: str | None) -> None:
    shown = message(text, begun=begun)
    assert (shown["content"], shown.get("reasoning_content")) == (content, thought)
    assert ("calls" in shown) == text.endswith(ADD)


def test_what_is_echoed_is_content_whatever_it_looks_like() -> None:
    reader = ChatReader(ThinkSplitter(False), HermesParser(NAMES, False), num_echoed=len(ADD))
    shown = message_of(reader.feed(f"{ADD}<think>x</think>y", True))
    assert (shown["content"], shown["reasoning_content"]) == (f"{ADD}y", "x")


def test_text_of_any_form_survives() -> None:
    """Random texts of the tags' own characters: what is told, tags of calls aside, adds up to the text."""
    rng = random.Random(5)
    pieces = [
        "<tool_call>",
        "</tool_call>",
        "<",
        "{",
        "}",
        '"name"',
        '"',
        ":",
        " ",
        "\n",
        "x",
        "\\",
        "<think>",
        "</think>",
    ]
    for seed in range(150):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 12)))
        assert message(text, seed=seed) == {"content": text}
