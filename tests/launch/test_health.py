"""What probes and requests are told in each state, through an engine that is put into it; the README has the table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.errors import EngineDeadError, WorkerError
from launch.server.app import create_app
from launch.server.health import State
from launch.server.lifecycle import Lifecycle
from tests.launch.fake_engine import FakeEngine
from tests.setup.repository import ROOT

# (changes to an engine that serves, whether the server drains) for each state, and for each that takes precedence.
SITUATIONS: list[tuple[State, dict[str, Any], bool]] = [
    (State.READY, {}, False),
    (State.QUEUE_FULL, {"queue_is_full": True}, False),
    (State.LOADING, {"is_ready": False}, False),
    (State.LOADING, {"is_ready": False, "queue_is_full": True}, False),
    (State.RECOVERING, {"is_ready": False, "recovering_from": WorkerError("rank 1 died", 1)}, False),
    (State.DRAINING, {}, True),
    (State.DRAINING, {"queue_is_full": True}, True),
    (State.DRAINING, {"is_ready": False, "recovering_from": WorkerError("rank 1 died", 1)}, True),
    (State.DEAD, {"is_ready": False, "failure": EngineDeadError("the engine died: rank 1 died")}, False),
    (State.DEAD, {"is_ready": False, "failure": EngineDeadError("the engine died: rank 1 died")}, True),
]


@pytest.mark.parametrize(("state", "changes", "draining"), SITUATIONS, ids=lambda each: getattr(each, "code", None))
async def test_each_state_is_told_as_the_table_says(
    tmp_path: Path, state: State, changes: dict[str, Any], draining: bool
) -> None:
    engine, lifecycle = FakeEngine(tmp_path), Lifecycle()
    vars(engine).update(changes)
    lifecycle.draining = draining
    transport = httpx.ASGITransport(create_app(engine, lifecycle=lifecycle))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        live = await client.get("/livez")
        assert (live.status_code, live.json()) == (200, {"status": "alive"})
        probes = [await client.get(path) for path in ("/readyz", "/health")]
        asked = [
            await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}),
            await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}),
            await client.post("/generate", json={"prompt_token_ids": [5]}),
        ]
    for answers, status in ((probes, state.probe), (asked, state.request)):
        for answer in answers:
            assert answer.status_code == status
            assert (answer.headers.get("retry-after") == "1") == (status in (429, 503))
            if status != 200:
                assert answer.json()["error"]["code"] == state.code
    if state.probe == 200:
        assert [each.json() for each in probes] == [{"status": state.code}] * 2
    assert bool(engine.prompts) == (state.request == 200), "a probe queues no work, nor does what is refused"
    if state in (State.RECOVERING, State.DEAD):
        assert "rank 1 died" in probes[0].json()["error"]["message"]


def test_the_table_of_the_readme_is_the_one_that_is_served() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| 200[^|]* \| (200|503) `(\w+)` \| (taken|429|503)", text, re.MULTILINE)
    told = [(code, int(probe), 200 if request == "taken" else int(request)) for probe, code, request in rows]
    assert told == [tuple(state.value) for state in State]
