"""The page in a real browser: Debian's chromium, headless, driven by Playwright, which brings no browser of its own.

After each test: no error on the console, and no request to another host. NANO_PAGE_SCREENSHOTS=FOLDER keeps the
screenshots, to be looked at.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.launch.fake_engine import FakeEngine, engine_error, served
from tests.launch.server_process import ServerProcess
from tests.waiting import until

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (./setup_env.sh --dev)")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (on Debian: apt install chromium)")

WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
LIGHT, DARK = "rgb(246, 247, 246)", "rgb(16, 20, 19)"
PATIENCE_MS = 20_000
UNAUTHORISED = "status of 401"

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


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as driver:
        # As root, which CI may be, Chromium has no sandbox.
        arguments = ["--no-sandbox"] if os.getuid() == 0 else []
        expect.set_options(timeout=PATIENCE_MS)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Opener:
    """Opens pages, and looks at the end at what they complained of and where they went."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self._complaints: list[str] = []
        self._urls: list[str] = []
        self._servers: set[str] = set()
        self.expected: str | None = None  # a complaint that is meant

    def __call__(self, url: str, viewport: dict[str, int] = WIDE, scheme: str = "light", **options: Any) -> Page:
        context = self._browser.new_context(viewport=viewport, color_scheme=scheme, **options)  # type: ignore[arg-type]
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and self._complain(message.text))
        page.on("pageerror", lambda error: self._complain(str(error)))
        page.on("request", lambda request: self._urls.append(request.url))
        self._servers.add(url)
        page.goto(url)
        return page

    def _complain(self, text: str) -> None:
        if self.expected is None or self.expected not in text:
            self._complaints.append(text)

    def close(self) -> None:
        """Close all pages, before their server ends."""
        for context in self._browser.contexts:
            context.close()

    def check(self) -> None:
        self.close()
        assert not self._complaints
        assert self._urls
        assert all(url.startswith(tuple(f"{server}/" for server in self._servers)) for url in self._urls)


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Opener]:
    opener = Opener(browser)
    yield opener
    opener.check()


@pytest.fixture
def engine(tmp_path: Path) -> FakeEngine:
    return FakeEngine(tmp_path, max_model_len=4096)


@pytest.fixture
def url(engine: FakeEngine, open_page: Opener) -> Iterator[str]:
    with served(engine) as url:
        yield url
        open_page.close()


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with ServerProcess() as server:
        yield server.wait_ready()


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[[Page, str], None]:
    """Takes a screenshot, which must be of the size of the window."""
    folder = Path(os.environ.get("NANO_PAGE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)

    def shoot(page: Page, name: str) -> None:
        picture = page.screenshot(path=folder / f"{name}.png")
        width, height = (int.from_bytes(picture[at : at + 4], "big") for at in (16, 20))
        assert {"width": width, "height": height} == page.viewport_size

    return shoot


def ready(page: Page) -> Page:
    expect(page.locator("#status")).to_have_text("ready")
    return page


def ask(page: Page, text: str) -> None:
    page.locator("#composer-text").fill(text)
    page.keyboard.press("Enter")


def tab_to(page: Page, selector: str, key: str = "Tab") -> None:
    """Walk there with the keyboard; twenty steps at most."""
    for _ in range(20):
        if page.locator(f"{selector}:focus").count():
            return
        page.keyboard.press(key)
    pytest.fail(f"{key} does not lead to {selector}")


def stats(page: Page) -> Any:
    """The line below the last answer, there once it has ended."""
    return page.locator(".answer:visible .stats:not(:empty)").last


# --- with the demo model ---


def test_a_person_chats_with_the_keyboard_alone(open_page: Opener, demo: str, shoot: Any) -> None:
    page = ready(open_page(demo))
    expect(page.locator("#composer-text")).to_be_focused()
    shoot(page, "wide-light-empty")
    page.keyboard.type("中国的首都是")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("哪里？")
    expect(page.locator("#composer-text")).to_have_value("中国的首都是\n哪里？")
    page.keyboard.press("Enter")
    expect(stats(page)).to_contain_text("stop")
    page.keyboard.type("What is 17 + 25?")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .markdown").last).to_have_text("42")
    expect(page.locator(".question")).to_have_count(2)
    # Back over the conversation and "New chat" to the mode, and forth again.
    tab_to(page, "input[value=chat]", "Shift+Tab")
    expect(page.locator("input[value=chat] + span")).to_have_css("outline-style", "solid")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#composer-label")).to_have_text("Prompt")
    expect(page.locator(".question").first).to_be_hidden()
    tab_to(page, "#composer-text")
    page.keyboard.type("中国的首都是")
    page.keyboard.press("Enter")
    expect(page.locator("#completion-log .answer > .body")).to_contain_text("中国的首都是北京")
    expect(stats(page)).to_contain_text("prompt tokens")
    page.get_by_role("button", name="Use as prompt").click()
    expect(page.locator("#composer-text")).to_have_value(re.compile("^中国的首都是北京"))


@contextlib.contextmanager
def kept_busy(url: str, asked: dict[str, Any]) -> Iterator[None]:
    """One stream after the other, so that one runs however fast the model is; the last is hung up on."""
    is_over = threading.Event()

    def keep_asking() -> None:
        with httpx.Client(timeout=100) as client:
            while not is_over.is_set():
                with client.stream("POST", f"{url}/v1/completions", json=asked | {"stream": True}) as stream:
                    for _ in stream.iter_lines():
                        if is_over.is_set():
                            break

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def test_the_view_follows_the_engine(open_page: Opener, demo: str, shoot: Any) -> None:
    body = {"prompt": "Tell me a story about Lily the bear. " * 4, "max_tokens": 3500, "ignore_eos": True, "n": 3}
    page = ready(open_page(demo))
    with kept_busy(demo, body):
        expect(page.locator("#t-running")).to_have_text("3")
        expect(page.locator("#sequences tr")).to_have_count(3)
        expect(page.locator("#prefixes li")).to_contain_text("3 sequences share")
        expect(page.locator("#n-shared")).not_to_have_text("0")
        expect(page.locator("#t-output")).to_have_text(re.compile("^[1-9]"))
        expect(page.locator("#t-ttft")).to_have_text(re.compile("m?s$"))
        expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"K/V blocks: \d+ free, .* shared"))
        box = page.locator("#map").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 3, box["y"] + 3)
        expect(page.locator("#map-hint")).to_have_text(re.compile("^Block 0: "))
        page.get_by_label("Colour tokens").check()
        ask(page, "What is 17 + 25?")
        expect(stats(page)).to_contain_text("stop")
        page.locator(".token").first.hover()
        shoot(page, "wide-light")
        page.emulate_media(color_scheme="dark")
        page.locator(".token").first.hover()
        shoot(page, "wide-dark")
        small = ready(open_page(demo, NARROW, "dark"))
        shoot(small, "narrow-dark-empty")
        small.get_by_role("button", name="Engine").click()
        expect(small.locator("#t-running")).to_have_text("3")
        shoot(small, "narrow-dark-engine")
    expect(page.locator("#t-running")).to_have_text("0")
    expect(page.locator("#no-sequences")).to_be_visible()


# --- with invented answers ---


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
