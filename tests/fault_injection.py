"""Raises an exception at the n-th line that some modules execute, and counts lines; knows nothing of what they do."""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parent.parent
UNSURVIVABLE = {"EngineCore._turn", "EngineCore._survive"}
"""What catches the exceptions of the rest: one of its own would end the process, and another process go on."""


@dataclasses.dataclass
class Faults:
    """What was executed, and where something was raised.

    Attributes:
        num_lines: lines executed so far.
        place: `file:line function` of the exception, once it was raised.
    """

    num_lines: int = 0
    place: str = ""


@contextmanager
def faults(
    modules: Iterable[str], error: Callable[[], BaseException] | None = None, at: int = 0, threads: bool = False
) -> Iterator[Faults]:
    """Within this, the line numbered `at` (from 1, over all `modules`) raises `error()` in place of being executed.

    It happens once. Without an error, or where fewer lines are executed, lines are only counted. `modules` are dotted
    names; the caller's thread is concerned and, with `threads`, those that are started meanwhile.
    """
    files = {str(ROOT / f"{name.replace('.', '/')}.py") for name in modules}
    found = Faults()

    def trace_line(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            found.num_lines += 1
            if error is not None and found.num_lines == at:
                name = Path(frame.f_code.co_filename).relative_to(ROOT)
                found.place = f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}"
                raise error()
        return trace_line

    def trace_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        return trace_line if code.co_filename in files and code.co_qualname not in UNSURVIVABLE else None

    before = sys.gettrace()
    if threads:
        threading.settrace(trace_call)
    sys.settrace(trace_call)
    try:
        yield found
    finally:
        sys.settrace(before)
        if threads:
            threading.settrace(before)  # type: ignore[arg-type]


@contextmanager
def untraced() -> Iterator[None]:
    """Within this, nothing is injected: a test looks at what there is."""
    before = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(before)
