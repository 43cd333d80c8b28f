"""The page with the demo model behind it, in a real browser: a conversation, and the view of the engine."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.launch.server_process import ServerProcess

pytest.importorskip("playwright.sync_api", reason="needs playwright (./setup_env.sh --dev)")
from playwright.sync_api import expect

from tests.launch.pages import (
    NARROW,
    Opener,
    ask,
    browser,
    needs_chromium,
    open_page,
    ready,
    shoot,
    stats,
    tab_to,
)

__all__ = ["browser", "open_page", "shoot"]  # fixtures
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def demo() -> Iterator[str]:
    with ServerProcess() as server:
        yield server.wait_ready()


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
