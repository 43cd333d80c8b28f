"""The page with invented answers, in a real browser: everything that a person can do on it or see on it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.launch.fake_engine import FakeEngine, engine_error, served
from tests.waiting import until

pytest.importorskip("playwright.sync_api", reason="needs playwright (./setup_env.sh --dev)")
from playwright.sync_api import expect

from tests.launch.pages import (
    DARK,
    LIGHT,
    NARROW,
    UNAUTHORISED,
    Opener,
    ask,
    browser,
    needs_chromium,
    open_page,
    ready,
    shoot,
    stats,
)

__all__ = ["browser", "open_page", "shoot"]  # fixtures
pytestmark = needs_chromium

MARKDOWN = """# Title

Some **bold** and *thin* `code`, [a link](https://example.com/), [a trap](javascript:alert(1)),
<img src=x onerror=alert(2)>.

1. one
   - nested
2. two

```python
print("<b>hi</b>")
```

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path, max_model_len=4096)


@pytest.fixture
def url(engine: FakeEngine, open_page: Opener) -> Iterator[str]:
    with served(engine) as url:
        yield url
        open_page.close()


def test_an_answer_streams_and_is_stopped(open_page: Opener, url: str, engine: FakeEngine, shoot: Any) -> None:
    engine.delay, engine.answer = 0.02, "word " * 2000
    page = ready(open_page(url))
    ask(page, "go on")
    answer = page.locator(".answer")
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(answer).to_contain_text("word word word")
    expect(page.locator("#sequences .tag")).to_have_text("yours")
    shoot(page, "wide-light-streaming")
    assert not engine.aborted
    page.keyboard.press("Escape")
    expect(answer).to_have_attribute("aria-busy", "false")
    expect(stats(page)).to_contain_text("stopped")
    expect(answer).to_contain_text("word word word")
    until(lambda: len(engine.aborted) == 1)
    ask(page, "once more")
    expect(answer).to_have_count(2)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".stats").nth(1)).to_contain_text("stopped")
    expect(page.locator("#composer-text")).to_be_focused()
    page.get_by_role("button", name="New chat").click()
    expect(answer).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_markdown_is_shown_and_markup_is_not_believed(open_page: Opener, url: str, engine: FakeEngine) -> None:
    engine.answer = MARKDOWN
    page = ready(open_page(url))
    page.locator("#max_tokens").fill("2000")
    ask(page, "show me")
    expect(stats(page)).to_contain_text("stop")
    body = page.locator(".answer .markdown")
    expect(body.locator("h3")).to_have_text("Title")
    expect(body.locator("strong")).to_have_text("bold")
    expect(body.locator("ol > li")).to_have_count(2)
    expect(body.locator("ol ul li")).to_have_text("nested")
    expect(body.locator("pre code")).to_have_text('print("<b>hi</b>")')
    expect(body.locator("td")).to_have_text(["1", "2"])
    expect(body.locator("img, script, b")).to_have_count(0)
    expect(body).to_contain_text("<img src=x onerror=alert(2)>")
    expect(body.locator("a")).to_have_count(1)
    expect(body.locator("a")).to_have_attribute("rel", re.compile("noopener"))
    expect(body).to_contain_text("[a trap](javascript:alert(1))")


def test_sampling_goes_with_the_request_and_impossible_values_do_not(
    open_page: Opener, url: str, engine: FakeEngine
) -> None:
    page = ready(open_page(url))
    values = {
        "temperature": "0.7", "max_tokens": "7", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "seed": "11",
        "presence_penalty": "0.5", "frequency_penalty": "-0.5", "repetition_penalty": "1.1",
    }  # fmt: skip
    for name, value in values.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#stop_strings").fill("END\n\\n\\n")
    page.locator("#system").fill("Be brief.")
    ask(page, "hi")
    expect(stats(page)).to_contain_text("length")
    params = engine.params[-1].to_dict()
    assert {name: params[name] for name in values} == {name: json.loads(value) for name, value in values.items()}
    assert list(params["stop"]) == ["END", "\n\n"]
    assert engine.tokenizer is not None
    assert "Be brief." in engine.tokenizer.decode(engine.prompts[-1])
    page.locator("#temperature").fill("5")
    ask(page, "hi again")
    page.wait_for_timeout(100)
    assert len(engine.params) == 1
    expect(page.locator("#temperature")).to_be_focused()
    page.get_by_role("button", name="Reset").click()
    expect(page.locator("#temperature")).to_have_value("")
    expect(page.locator("#max_tokens")).to_have_value("256")


@pytest.mark.parametrize("mode", ["chat", "completion"])
def test_tokens_are_coloured_and_tell_their_alternatives(open_page: Opener, url: str, mode: str) -> None:
    page = ready(open_page(url))
    page.get_by_text(mode.title(), exact=True).click()
    page.get_by_label("Colour tokens").check()
    ask(page, "hi")
    expect(stats(page)).to_contain_text("stop")
    tokens = page.locator(".token")
    assert tokens.count() > 5
    expect(tokens.first).to_have_class(re.compile(r"\bp4\b"))  # the fake's tokens have e^-3
    tokens.nth(2).hover()
    tip = page.get_by_role("tooltip")
    # The fake's alternatives are halves of characters, which a completion's object of texts cannot tell apart.
    expect(tip.locator("li")).to_have_count(5 if mode == "chat" else 2)
    expect(tip.locator("li.chosen")).to_contain_text("5.0 %")
    page.mouse.move(1, 1)
    expect(tip).to_be_hidden()
    page.locator(".tokens").focus()
    page.keyboard.press("ArrowRight")
    expect(tip).to_be_visible()
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()
    if mode == "chat":
        expect(page.locator(".tokens")).to_contain_text("北京 is the capital 😀.")
        page.get_by_role("button", name="Tokens").click()
        expect(page.locator(".answer .markdown")).to_have_text("北京 is the capital 😀.")


def test_errors_are_shown_where_the_answer_would_be(open_page: Opener, url: str, engine: FakeEngine) -> None:
    open_page.expected = "status of 429"
    engine.fail_after = 3
    page = ready(open_page(url))
    ask(page, "hi")
    expect(page.get_by_role("alert").first).to_have_text("rank 1 fell over")
    engine.fail_after, engine.queue_is_full = None, True
    ask(page, "hi")
    expect(page.get_by_role("alert").nth(1)).to_have_text("no room for 1")
    engine.queue_is_full = False
    ask(page, "hi")
    expect(stats(page)).to_contain_text("stop")


def test_an_answer_is_had_once_more_and_its_reasoning_is_folded(
    open_page: Opener, url: str, engine: FakeEngine
) -> None:
    """Reasoning, a comment in a long silence, and a stream without an end, as proxies and other models send them."""
    page = ready(open_page(url))
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "Let me see."}, {"content": "It is 42."}]
    chunks = [
        {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    begun = ": ping\r\n\r\n" + "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks)
    pattern, headers = "**/v1/chat/completions", {"Content-Type": "text/event-stream"}
    page.route(pattern, lambda route: route.fulfill(body=begun + "data: [DONE]\n\n", headers=headers))
    ask(page, "hi")
    expect(page.locator(".answer .markdown")).to_have_text("It is 42.")
    expect(page.locator(".thinking .body")).to_be_hidden()
    page.get_by_text("Reasoning").click()
    expect(page.locator(".thinking .body")).to_have_text("Let me see.")
    page.unroute(pattern)
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".answer .markdown")).to_have_text("北京 is the capital 😀.")
    expect(page.locator(".answer")).to_have_count(1)
    expect(stats(page)).to_contain_text("stop")
    assert engine.tokenizer is not None
    assert "42" not in engine.tokenizer.decode(engine.prompts[-1]), "the first answer is no part of the conversation"
    page.route(pattern, lambda route: route.fulfill(body=begun, headers=headers))
    ask(page, "and?")
    expect(page.get_by_role("alert").first).to_have_text("The stream broke off.")
    expect(page.locator(".answer .markdown").last).to_have_text("It is 42.")


def test_the_key_is_asked_for_and_kept_for_the_tab(open_page: Opener, tmp_path: Path, shoot: Any) -> None:
    open_page.expected = UNAUTHORISED
    with served(FakeEngine(tmp_path, api_key="schlüssel")) as url:
        page = open_page(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        expect(page.locator("#engine-note")).to_contain_text("key is wanted")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_role("alert")).to_be_visible()
        shoot(page, "wide-light-key")
        page.keyboard.type("schlüssel")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        ready(page)
        ask(page, "hi")
        expect(stats(page)).to_contain_text("stop")
        page.reload()
        ready(page)
        expect(dialog).to_be_hidden()
        stranger = open_page(url)
        expect(stranger.get_by_role("dialog")).to_be_visible()
        stranger.keyboard.press("Escape")
        expect(stranger.locator("#status")).to_have_text("key wanted")
        ask(stranger, "hi")
        expect(stranger.get_by_role("dialog")).to_be_visible()
        stranger.keyboard.type("schlüssel")
        stranger.keyboard.press("Enter")
        expect(stats(stranger)).to_contain_text("stop")
        ready(stranger)
        open_page.close()


def test_the_theme_is_the_systems_or_the_chosen_one(open_page: Opener, url: str) -> None:
    page = ready(open_page(url, scheme="dark"))
    body, button = page.locator("body"), page.locator("#theme-button")
    expect(body).to_have_css("background-color", DARK)
    button.click()
    expect(button).to_have_text("Theme: light")
    expect(body).to_have_css("background-color", LIGHT)
    page.reload()
    expect(button).to_have_text("Theme: light")
    expect(body).to_have_css("background-color", LIGHT)
    button.click()
    expect(button).to_have_text("Theme: dark")
    expect(body).to_have_css("background-color", DARK)
    button.click()
    expect(button).to_have_text("Theme: system")
    page.emulate_media(color_scheme="light")
    expect(body).to_have_css("background-color", LIGHT)


def test_a_narrow_window_shows_one_view_at_a_time_and_asks_only_for_what_is_seen(
    open_page: Opener, url: str, engine: FakeEngine, shoot: Any
) -> None:
    engine.answer = MARKDOWN
    page = ready(open_page(url, NARROW))
    expect(page.locator("#engine")).to_be_hidden()
    assert engine.num_views == 0
    page.locator("#settings-box summary").click()
    page.locator("#max_tokens").fill("2000")
    shoot(page, "narrow-light-settings")
    page.locator("#settings-box summary").click()
    ask(page, "hi")
    expect(stats(page)).to_contain_text("stop")
    shoot(page, "narrow-light-chat")
    for each in ("header.bar", "#composer", "#transcript", ".answer", ".code", "#send"):
        box = page.locator(each).first.bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= NARROW["width"], each
    page.get_by_role("button", name="Engine").click()
    expect(page.locator("#t-waiting")).to_have_text("2")
    expect(page.locator("#t-waiting-sub")).to_have_text("1 swapped")
    expect(page.locator("#host")).to_be_visible()
    expect(page.locator("#prefixes")).to_have_text("3 sequences share 2 blocks (32 tokens), which saves 4")
    expect(page.locator("#composer")).to_be_hidden()
    shoot(page, "narrow-light-engine")
    page.get_by_role("button", name="Playground").click()
    seen = engine.num_views
    page.wait_for_timeout(1300)
    assert engine.num_views <= seen + 1, "nobody looks, and still the engine is asked"


def test_a_server_that_loads_is_waited_for(open_page: Opener, url: str, engine: FakeEngine) -> None:
    open_page.expected = "status of 503"
    engine.is_ready = False
    page = open_page(url)
    expect(page.locator("#status")).to_have_text("loading")
    expect(page.locator("#engine-note")).to_contain_text("still loading")
    engine.is_ready = True
    ready(page)
    expect(page.locator("#engine-note")).to_be_hidden()


def test_a_server_that_recovers_is_waited_for_and_one_that_fails_is_told(
    open_page: Opener, url: str, engine: FakeEngine, shoot: Any
) -> None:
    open_page.expected = "status of 503"
    page = ready(open_page(url))
    engine.is_ready, engine.recovering_from = False, engine_error("rank 1 was killed by SIGKILL")
    expect(page.locator("#status")).to_have_text("recovering")
    expect(page.locator("#engine-note")).to_contain_text("recovers from a failure: rank 1 was killed")
    ask(page, "hi")
    expect(page.get_by_role("alert").first).to_contain_text("recovers from a failure")
    shoot(page, "wide-light-recovering")
    engine.is_ready, engine.recovering_from = True, None
    ready(page)
    page.get_by_role("button", name="Again").click()
    expect(stats(page)).to_contain_text("stop")
    engine.failure = engine_error("rank 1 died 5 times")
    ask(page, "hi")
    expect(page.locator("#status")).to_have_text("engine failed")
    expect(page.get_by_role("alert").last).to_have_text("rank 1 died 5 times")
