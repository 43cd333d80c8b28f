"""Threads and tasks that must not die unnoticed: an exception that ends one is logged, and has a consequence at once.

Nobody waits for a thread, and often nobody for a task: what it raises would go to stderr at best, and what it was there
for would not be done any more. So each thread of ours is started here, each future whose result nobody takes is watched
here, and whoever does it says what follows. It knows none of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

OnDeath = Callable[[BaseException], object]
"""What follows, given what was raised. It is called where it was raised, and only once."""


def nothing_more(error: BaseException) -> None:
    """What follows where somebody else sees to it, and only the log was wanted."""


def start_thread(run: Callable[[], object], name: str, on_death: OnDeath) -> threading.Thread:
    """Start a daemon thread; `on_death` is called in it when `run` raises, and not when it returns."""

    def watched() -> None:
        try:
            run()
        except BaseException as error:
            note_death(f"the thread {name!r}", error, on_death)

    thread = threading.Thread(target=watched, name=name, daemon=True)
    thread.start()
    return thread


def watch(
    future: asyncio.Future[Any] | concurrent.futures.Future[Any], what: str, on_death: OnDeath = nothing_more
) -> None:
    """Have `on_death` called when a task, or what a thread of a pool works on, raises; not when it is cancelled.

    It is called on the task's event loop, or in the pool's thread.
    """

    def look(done: asyncio.Future[Any] | concurrent.futures.Future[Any]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None:
            note_death(what, error, on_death)

    future.add_done_callback(look)


class Breakable(Protocol):
    """Something that an event loop calls back."""

    def break_down(self, error: BaseException) -> None:
        """One of the callbacks failed: end whatever waits for what they do."""


B = TypeVar("B", bound=Breakable)


def vital(callback: Callable[[B], None]) -> Callable[[B], None]:
    """A method that an event loop calls. The loop would only log what it raises, and others would wait in vain."""

    @functools.wraps(callback)
    def watched(self: B) -> None:
        try:
            callback(self)
        except Exception as error:
            note_death(callback.__qualname__, error, self.break_down)

    return watched


def guard_threads(on_death: OnDeath) -> None:
    """The same for every other thread of this process, those of libraries: for a process that is ours alone."""

    def hook(arguments: threading.ExceptHookArgs) -> None:
        name = "of a library" if arguments.thread is None else repr(arguments.thread.name)
        error = arguments.exc_value or arguments.exc_type()
        if not isinstance(error, SystemExit):
            note_death(f"the thread {name}", error, on_death)

    threading.excepthook = hook


def note_death(what: str, error: BaseException, on_death: OnDeath = nothing_more) -> None:
    """Log what ended and why, then let follow what must."""
    logger.critical("%s died: %s: %s", what, type(error).__name__, error, exc_info=error)
    on_death(error)
