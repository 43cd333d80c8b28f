"""How far the loading is: a bar on a terminal, lines in the log elsewhere, and every tensor once in either case."""

from __future__ import annotations

import io
import itertools
import logging
from pathlib import Path
from typing import Any, cast

import pytest

from workers.load_progress import LINE_SECONDS, num_bytes, shown_while_read
from workers.weight_files import WeightTensor


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class FakeTensor:
    def __init__(self, file: int, *shape: int, dtype_name: str = "BF16") -> None:
        self.path, self.shape, self.dtype_name = Path(f"model-{file}.safetensors"), shape, dtype_name


def tensors() -> dict[str, WeightTensor]:
    made: dict[str, Any] = {f"layer.{i}": FakeTensor(1 + i // 2, 1000, 1000) for i in range(4)}
    return cast(dict[str, WeightTensor], made)


def test_a_terminal_sees_a_bar_that_vanishes_when_it_is_full() -> None:
    terminal = Terminal()
    assert [name for name, _ in shown_while_read(tensors(), terminal)] == list(tensors())
    shown = terminal.getvalue()
    assert "loading weights:   0%" in shown
    assert "0.00/8.00M" in shown, "the bytes of all files"
    assert shown.endswith("\r"), "the next line takes its place"


def test_elsewhere_a_slow_load_says_so_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stream, seconds = io.StringIO(), itertools.count(0, LINE_SECONDS / 4)
    names = [name for name, _ in shown_while_read(tensors(), stream, lambda: next(seconds))]
    assert names == list(tensors())
    assert not stream.getvalue()
    assert [record.getMessage() for record in caplog.records] == ["loading weights: 100% (0.0 of 0.0 GB, file 2 of 2)"]


def test_a_quick_load_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert len(list(shown_while_read(tensors(), None))) == 4
    assert not caplog.records


def test_bytes_are_those_of_the_file() -> None:
    made: Any = [FakeTensor(1, 3, 5), FakeTensor(1, 7, dtype_name="F32"), FakeTensor(1, dtype_name="F16")]
    assert num_bytes(made) == 2 * 15 + 4 * 7 + 2
