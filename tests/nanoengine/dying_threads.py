"""Processes of the engine one of whose threads dies by an exception.

`run_worker` is the entry of a rank, to which the model's name `fake:WHAT@RANK` says which thread. As a program it is a
scheduler, to which the variable NANO_TEST_DYING says it: it must be known before any thread is started.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any, NoReturn

from nanoengine.channel import RankPort
from nanoengine.control_block import RankWords
from nanoengine.engine_process import receive_bootstrap
from tests.nanoengine import fake_worker

INJECTED = "injected by a test"


def fail(*_: Any) -> NoReturn:
    raise RuntimeError(INJECTED)


def run_worker(port: RankPort) -> None:
    match fake_worker.misbehaviour(port.config, port.rank):
        case "heartbeat":
            RankWords.beat = fail  # type: ignore[method-assign]
        case "library":
            threading.Thread(target=fail, name="native pool").start()
    fake_worker.run_worker(port)


def main() -> None:
    what = os.environ["NANO_TEST_DYING"]
    if what == "death pipe":
        os.read = fail  # what the thread calls first that waits for the owner's end
    receive_bootstrap()
    if what == "native pool":
        threading.Thread(target=fail, name="native pool").start()
    signal.pause()


if __name__ == "__main__":
    main()
