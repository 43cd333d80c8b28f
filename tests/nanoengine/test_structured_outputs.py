"""The form of an output: what is refused, what travels, and what each becomes for llguidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llguidance
import pytest

from configs.errors import RequestError
from nanoengine.grammar import error_of, load_tokenizer, new_matcher
from nanoengine.sampling_params import SamplingParams
from nanoengine.structured_outputs import MAX_CHARS, StructuredOutputsParams
from tests.nanoengine.tokenizers_for_tests import write_byte_fallback, write_byte_level, write_metaspace

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
BYTES = llguidance.LLTokenizer("byte")


def accepts(params: StructuredOutputsParams, text: str) -> bool:
    """Whether `text` is a complete output of that form."""
    matcher = new_matcher(BYTES, params.to_grammar())
    assert not matcher.is_error(), error_of(matcher)
    ids = list(text.encode())
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json": OBJECT, "regex": "a"}, "got json, regex"),
        ({"json_object": False}, "got none"),
        ({"json_object": 1}, "json_object must be true or false, got 1"),
        ({"json": [1]}, r"json must be a JSON schema"),
        ({"json": "[1]"}, "json must be a JSON object"),
        ({"json": "{"}, "json is not a JSON schema: JSONDecodeError"),
        ({"json": {"a": float("nan")}}, "json is not a JSON schema: ValueError"),
        ({"json": {"a": {1, 2}}}, "json is not a JSON schema: TypeError"),
        ({"json": '{"a":' * 9000 + "1" + "}" * 9000}, "json is not a JSON schema: RecursionError"),
        ({"json": {"a": "x" * MAX_CHARS}}, f"at most {MAX_CHARS} characters"),
        ({"regex": ""}, f"regex must be text of 1 to {MAX_CHARS} characters, got 0"),
        ({"regex": "a" * (MAX_CHARS + 1)}, f"regex must be text of 1 to {MAX_CHARS} characters"),
        ({"regex": "\ud800"}, "regex holds a lone surrogate at character 0"),
        ({"grammar": 5}, "grammar must be text"),
        ({"choice": []}, "choice must be 1 to 4096 texts"),
        ({"choice": "yes"}, "choice must be a list of texts, got 'yes'"),
        ({"choice": ["a", 1]}, "choice must be a list of texts"),
        ({"choice": ["x" * MAX_CHARS, "y"]}, "choice must be 1 to 4096 texts of 65536 characters in all"),
        ({"regex": "a", "disable_any_whitespace": True}, "disable_any_whitespace belongs to json or json_object"),
        (
            {"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "},
            "whitespace_pattern cannot be given with disable_any_whitespace",
        ),
        ({"structural_tag": "x"}, "has no field 'structural_tag'"),
    ],
)
def test_what_is_impossible_is_refused_and_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams(structured_outputs=fields)
    assert caught.value.param == "structured_outputs"


@pytest.mark.parametrize(
    "fields",
    [
        {"json": json.dumps(OBJECT, separators=(",", ":")), "whitespace_pattern": "[ ]?"},
        {"regex": "中+"},
        {"choice": ["a", "ü"]},
        {"grammar": 'root ::= "a"'},
        {"json_object": True, "disable_any_whitespace": True},
    ],
)
def test_it_travels_as_primitives(fields: dict[str, Any]) -> None:
    params = SamplingParams(structured_outputs=fields)
    data = params.to_dict()
    assert data["structured_outputs"] == fields
    assert SamplingParams.from_dict(json.loads(json.dumps(data))) == params


def test_a_schema_keeps_the_order_of_its_properties() -> None:
    form = StructuredOutputsParams(json={"properties": {"b": {}, "a": {}}, "type": "object"})
    assert accepts(form, '{"b":1,"a":2}')
    assert not accepts(form, '{"a":1,"b":2}')


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"regex": "^[a-c]+/\\d$"}, ["abc/1"], ["", "abc/", "^a/1"]),
        ({"choice": ['a"b', "é中\n", ""]}, ['a"b', "é中\n", ""], ["a", "b"]),
        ({"grammar": 'root ::= "(" root ")" | [0-9]+'}, ["7", "((12))"], ["(1", ""]),
        ({"grammar": 'start: "(" start ")" | NUM\nNUM: /[0-9]+/'}, ["7", "((12))"], ["(1", ""]),
        ({"json_object": True}, ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": 1\n}'], ["[]", "1", "", "{} "]),
        ({"json": OBJECT}, ['{"a":1}', '{"b":1}', '{ "a": 1 }'], ['{"a":1.5}', '{"a":"1"}']),
        ({"json": OBJECT, "disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}']),
        ({"json": OBJECT, "disable_additional_properties": True}, ['{"a":1}'], ['{"b":1}']),
        ({"json": OBJECT, "whitespace_pattern": " {2}"}, ['{"a":  1}', '{"a":1}'], ['{"a": 1}', '{"a":    1}']),
    ],
    ids=str,
)
def test_each_form_accepts_what_it_says(fields: dict[str, Any], good: list[str], bad: list[str]) -> None:
    form = StructuredOutputsParams(**fields)
    assert [text for text in good if not accepts(form, text)] == []
    assert [text for text in bad if accepts(form, text)] == []


def test_whitespace_has_an_end_unless_the_schema_says_otherwise() -> None:
    """A model that has lost its way would go on with blanks until max_tokens."""
    indented = '{\n                "a": 1\n}'
    assert accepts(StructuredOutputsParams(json=OBJECT), indented)
    assert not accepts(StructuredOutputsParams(json=OBJECT), '{\n\n\n"a": 1}')
    assert accepts(StructuredOutputsParams(json=OBJECT | {"x-guidance": {"whitespace_flexible": True}}), '{\n\n"a":1}')


def test_a_schema_is_changed_where_it_is_a_schema_only() -> None:
    """What looks like a schema in an enum is data, and what is named like a keyword is a property."""
    data = {"properties": {}, "exclusiveMinimum": 4, "maximum": 4.5}
    schema = {"type": "object", "properties": {"enum": {"type": "object", "properties": {}}, "x": {"const": data}}}
    form = StructuredOutputsParams(json=schema, disable_additional_properties=True)
    found = json.loads(form.to_grammar())["grammars"][0]["json_schema"]
    assert found["properties"]["x"] == {"const": data}
    assert found["additionalProperties"] is False
    assert found["properties"]["enum"]["additionalProperties"] is False


@pytest.mark.parametrize("low", [-4.5, -4, -0.5, 0, 4, 9.5])
@pytest.mark.parametrize("width", [0.25, 0.5, 1, 1.5])
def test_an_exclusive_bound_is_excluded(low: float, width: float) -> None:
    """llguidance 1.9.1 lets a whole number pass that is an exclusive bound less than 1 from the other one."""
    high = low + width
    form = StructuredOutputsParams(json={"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high})
    numbers = [f"{sign}{whole}{part}" for sign in ("", "-") for whole in range(12) for part in ("", ".0", ".25", ".5")]
    wrong = [text for text in numbers if accepts(form, text) and not low < float(text) < high]
    assert not wrong
    assert accepts(form, str(low + width / 2))


def test_tokenizers_of_both_byte_forms_are_read_and_others_are_refused(tmp_path: Path) -> None:
    from configs.errors import TokenizerError

    level = write_byte_level(tmp_path / "level") / "tokenizer.json"
    fallback = write_byte_fallback(tmp_path / "fallback") / "tokenizer.json"
    assert load_tokenizer(level, (342,)).eos_tokens == [342]
    assert load_tokenizer(fallback, (2, 9999)).eos_tokens == [2], "an eos that the tokenizer lacks cannot come"
    with pytest.raises(TokenizerError, match="cannot be matched"):
        load_tokenizer(fallback, (9999,))
    with pytest.raises(TokenizerError, match="decoder"):
        load_tokenizer(write_metaspace(tmp_path / "words") / "tokenizer.json", (7,))
