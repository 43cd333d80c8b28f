"""The page's files and the JSON of its live view, as the server sends them."""

from __future__ import annotations

import base64
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from launch.server import page
from launch.server.app import create_app
from tests.launch.fake_engine import FakeEngine

STATIC = Path(page.__file__).parent / "static"


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path, api_key="key")


@pytest.fixture
def app(engine: FakeEngine) -> FastAPI:
    return create_app(engine)


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client


async def test_every_file_of_the_page_is_open_and_strict(client: httpx.AsyncClient) -> None:
    assert {"/", "/static/app.js", "/static/base.css", "/static/icon.svg"} <= page.PATHS
    for path in page.PATHS:
        response = await client.get(path)
        assert response.status_code == 200, path
        policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert response.headers["x-content-type-options"] == "nosniff"
        suffix = Path(path).suffix or ".html"
        kind = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[suffix]
        assert response.headers["content-type"].startswith(kind)
        head = await client.head(path)
        assert (head.status_code, head.content) == (200, b"")


async def test_a_file_that_the_browser_has_is_not_sent_again(client: httpx.AsyncClient) -> None:
    first = await client.get("/static/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = await client.get("/static/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/static/app.js", headers={"If-None-Match": '"other"'})).status_code == 200


@pytest.mark.parametrize("path", ["/static/", "/static/nothing.js", "/static/../page.py", "/static/%2e%2e/page.py"])
async def test_nothing_but_the_files_of_the_page_is_open(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 401
    assert (await client.get(path, headers={"Authorization": "Bearer key"})).status_code == 404


async def test_the_engines_state_is_guarded_and_told(
    client: httpx.AsyncClient, engine: FakeEngine, app: FastAPI
) -> None:
    assert (await client.get("/engine/state")).status_code == 401
    assert engine.num_views == 0
    client.headers["Authorization"] = "Bearer key"
    state = (await client.get("/engine/state")).json()
    assert (state["model"], state["num_waiting"], state["max_num_seqs"]) == ("demo", 2, 256)
    assert base64.b64decode(state["device_blocks"]["shared"]) == b"\0\0\xff\xff\0\0"
    assert state["host_blocks"]["num_blocks"] == 4
    assert state["latencies"] == {
        "ttft": {"count": 3, "p50": 0.05, "p90": 0.12},
        "tpot": {"count": 0, "p50": None, "p90": None},
    }
    assert state["prefixes"] == [{"root": 2, "num_seqs": 3, "num_blocks": 2, "num_saved": 4}]
    app.state.lifecycle.draining = True
    assert (await client.get("/engine/state")).status_code == 200
    assert (await client.get("/readyz")).status_code == 503
    engine.is_ready = False
    assert (await client.get("/engine/state")).status_code == 503


def test_the_page_loads_from_this_server_only_and_makes_no_markup_of_strings() -> None:
    """The policy would refuse it in the browser; this says where."""
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        for forbidden in (r"https?://[a-z]", r"innerHTML", r"outerHTML", r"insertAdjacentHTML", r"document\.write"):
            assert not re.search(forbidden, text), f"{path.name} has {forbidden}"
        assert not re.search(r"\beval\(|new Function|\son\w+=\"|style=\"|javascript:", text), path.name
        assert len(text.splitlines()) < 500, path.name
    html = (STATIC / "index.html").read_text(encoding="utf-8")
    assert all(src for src in re.findall(r"<script([^>]*)>", html) if "src=" in src)
    assert "<style" not in html
    loaded = set(re.findall(r'(?:src|href)="(static/[^"]+)"', html))
    assert {f"/{name}" for name in loaded} <= page.PATHS
