"""What all tests share: the option --slow, the skips of the markers `gpu` and `slow`, Ctrl-C, one thread
for torch, and garbage collections that look at what is new.

Where there is no GPU, Triton's kernels run under its interpreter; it must be told before anybody imports triton.

It imports no torch unless a test marked `gpu` was collected, so that the tests of text and folders start at once.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure() -> None:
    # What a shell without job control runs in its background ignores Ctrl-C, and so would all that a test starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries look for what is left at the interpreter's end


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_cuda():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Each engine that is closed collects garbage, which would look at all that the suite has imported every time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operators on several threads crawl when other programs run; a test about threads sets their number itself.

    Processes that a test starts are not concerned: they choose for themselves.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
