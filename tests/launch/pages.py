"""The page in a real browser: Debian's chromium, headless, driven by Playwright, which brings no browser of its own.

After each test: no error on the console, and no request to another host. NANO_PAGE_SCREENSHOTS=FOLDER keeps the
screenshots, to be looked at. Modules of tests import the fixtures from here; without Playwright they are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (./setup_env.sh --dev)")
from playwright.sync_api import Browser, Page, expect  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (on Debian: apt install chromium)")

WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
LIGHT, DARK = "rgb(246, 247, 246)", "rgb(16, 20, 19)"
PATIENCE_MS = 20_000
UNAUTHORISED = "status of 401"


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
