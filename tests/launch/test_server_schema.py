"""Requests that schemathesis invents from the OpenAPI document: no fault of ours, and answers as documented."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from launch.server.app import create_app
from tests.launch import chat_templates
from tests.launch.fake_engine import FakeEngine

schemathesis = pytest.importorskip("schemathesis")

NUM_CASES = 25


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    engine = FakeEngine(tmp_path_factory.mktemp("engine"), chat_templates.THINKING, max_model_len=512)
    engine.answer = "a"
    return create_app(engine)


def operations(app: Any) -> list[Any]:
    return [each.ok() for each in schemathesis.openapi.from_dict(app.openapi()).get_all_operations()]


def requests_of(app: Any, operation: Any) -> set[int]:
    """Ask what schemathesis invents for an operation, over HTTP and in this thread; the statuses that came."""
    checks = schemathesis.checks
    checks.load_all_checks()
    names = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
    wanted = [checks.not_a_server_error, *checks.CHECKS.get_by_names(names)]
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    seen: set[int] = set()

    async def send(case: Any) -> httpx.Response:
        sent = case.as_transport_kwargs(base_url="http://test")
        kept = {name: sent[name] for name in ("headers", "params", "json") if sent.get(name) is not None}
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(sent["method"], sent["url"], **kept)

    @seed(7)
    @settings(
        max_examples=NUM_CASES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def check(case: Any) -> None:
        response = asyncio.run(send(case))
        seen.add(response.status_code)
        case.validate_response(response, checks=wanted)

    check()
    return seen


def test_invented_requests_are_answered_as_documented(app: Any) -> None:
    seen = {operation.path: requests_of(app, operation) for operation in operations(app)}
    assert {200, 400} <= seen["/v1/chat/completions"], seen  # so it tries both
    assert 400 in seen["/v1/completions"], seen


def test_the_document_tells_of_every_error(app: Any) -> None:
    document = app.openapi()
    text = json.dumps(document)
    assert "HTTPValidationError" not in text
    for path in ("/v1/completions", "/v1/chat/completions"):
        answers = document["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "413", "429", "500", "503", "504"} <= set(answers)
        assert "422" not in answers
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    assert "401" not in document["paths"]["/livez"]["get"]["responses"]
