"""The HTTP routes and structured output: each way of asking for it, and errors in the words of whoever asked."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from configs.errors import RequestError
from nanoengine.structured_outputs import StructuredOutputsParams
from tests.launch.fake_engine import FakeEngine
from tests.launch.http_answers import HI, error_of

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
ROUTES = [("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", HI)]


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            {"json": SCHEMA},
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x-1_Y", "description": "d", "strict": True, "schema": SCHEMA},
                }
            },
            {"json": SCHEMA},
        ),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, "same"),
        ({"structured_outputs": {"choice": ["a", "b"], "regex": None}}, {"choice": ["a", "b"]}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        (
            {"guided_json": json.dumps(SCHEMA), "guided_whitespace_pattern": " "},
            {"json": SCHEMA, "whitespace_pattern": " "},
        ),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a", "b"]}, {"choice": ["a", "b"]}),
        ({"guided_grammar": 'root ::= "a"', "guided_json": None}, {"grammar": 'root ::= "a"'}),
    ],
)  # fmt: skip
async def test_each_way_of_asking_reaches_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], form: Any
) -> None:
    for path, body in ROUTES:
        response = await client.post(path, json=body | fields)
        assert response.status_code == 200, response.text
        wanted = fields["structured_outputs"] if form == "same" else form
        assert engine.params[-1].structured_outputs == StructuredOutputsParams.of(wanted)


def schema_of(**changes: Any) -> dict[str, Any]:
    fields = {"name": "x", "schema": SCHEMA} | changes
    return {"response_format": {"type": "json_schema", "json_schema": fields}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_object", "json_schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (schema_of(name="a b"), "response_format.json_schema.name"),
        (schema_of(name=None), "response_format.json_schema.name"),
        (schema_of(strict="yes"), "response_format.json_schema.strict"),
        (schema_of(description=5), "response_format.json_schema.description"),
        (schema_of(schema="{}"), "response_format.json_schema.schema"),
        (schema_of(extra=1), "response_format.json_schema"),
        (schema_of(schema={"a": "x" * 70000}), "response_format"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
        ({"guided_regex": "a", "guided_whitespace_pattern": " "}, "guided_regex"),
        ({"guided_regex": "a", "guided_json": SCHEMA}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"structured_outputs": "a"}, "structured_outputs"),
    ],
)
async def test_a_malformed_one_is_a_400_that_names_the_field(
    client: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    for path, body in ROUTES:
        error = error_of(await client.post(path, json=body | fields), 400)
        assert error["param"] == param, error
        assert param.split(".")[0] in error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_refuses_is_told_in_the_clients_words(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.raise_at_once = RequestError("structured_outputs.json cannot be matched: odd", "structured_outputs")
    body = HI | {"stream": stream}
    error = error_of(await client.post("/v1/chat/completions", json=body | schema_of()), 400)
    assert (error["message"], error["param"]) == ("response_format cannot be matched: odd", "response_format")
    asked = {"structured_outputs": {"json": SCHEMA}}
    error = error_of(await client.post("/v1/chat/completions", json=body | asked), 400)
    assert error["message"] == "structured_outputs.json cannot be matched: odd"
    engine.raise_at_once = RequestError("temperature is odd", "temperature")
    error = error_of(await client.post("/v1/chat/completions", json=body | schema_of()), 400)
    assert error["param"] == "temperature"
