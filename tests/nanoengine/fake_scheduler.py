"""A scheduler process without a scheduler (`python -m tests.nanoengine.fake_scheduler`), for tests of its owner.

What it does is asked for through the model's name, since that reaches it: `fake:WHAT`. Its ranks are those of
fake_worker. It writes the pids of all of them into the file that NANO_TEST_PIDS names, once they exist.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from configs.errors import CheckpointError
from nanoengine.engine_process import Bootstrap, receive_bootstrap
from nanoengine.executor import MultiprocessExecutor
from nanoengine.step import Epoch
from tests.nanoengine.process_tools import descendants

ENTRY = "tests.nanoengine.fake_worker:run_worker"


def tell_pids(wanted: int) -> None:
    """Write our pid and those of the ranks, all at once."""
    path = Path(os.environ["NANO_TEST_PIDS"])
    while len(ranks := descendants()) < wanted:
        time.sleep(0.02)
    path.with_suffix(".part").write_text(json.dumps([os.getpid(), *ranks]))
    path.with_suffix(".part").rename(path)


def serve(bootstrap: Bootstrap, what: str) -> None:
    executor = MultiprocessExecutor(bootstrap.config, bootstrap.run_dir, entry=ENTRY)
    # In a thread: ranks that hang while loading keep `start` from returning.
    teller = threading.Thread(target=tell_pids, args=(bootstrap.config.parallel.world_size,), daemon=True)
    teller.start()
    try:
        executor.start(Epoch(bootstrap.incarnation, 1))
        if what == "stuck":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        teller.join()  # an owner that ends as soon as it hears `ready` would end the ranks before they were counted
        bootstrap.report_ready()
        if what in ("late-failure", "failure-when-told"):
            while what == "failure-when-told" and not Path(os.environ["NANO_TEST_PIDS"] + ".fail").exists():
                time.sleep(0.01)
            bootstrap.report_failure(RuntimeError("out of luck"))
            sys.exit(1)
        signal.pause()
        time.sleep(600)
    finally:
        executor.stop()


def main() -> None:
    bootstrap = receive_bootstrap()
    what = bootstrap.config.model.model.removeprefix("fake:").partition("@")[0]
    match what:
        case "checkpoint-error":
            bootstrap.report_failure(CheckpointError("no weights in /nowhere"))
            sys.exit(1)
        case "slow-exit":
            atexit.register(time.sleep, 1)
            bootstrap.report_failure(CheckpointError("no weights in /nowhere"))
            sys.exit(1)
        case "die":
            os._exit(3)
        case "hang":
            time.sleep(600)
        case "echo":
            Path(os.environ["NANO_TEST_PIDS"]).write_text(
                json.dumps(
                    {
                        "config": bootstrap.config.to_dict(),
                        "run_dir": str(bootstrap.run_dir),
                        "front_address": bootstrap.front_address,
                        "incarnation": bootstrap.incarnation,
                        "argv": sys.argv,
                        "environ": dict(os.environ),
                        "stdin": sys.stdin.read(),
                        "descriptors": sorted(os.listdir("/proc/self/fd")),
                    }
                )
            )
            bootstrap.report_ready()
            signal.pause()
        case _:
            serve(bootstrap, what)


if __name__ == "__main__":
    main()
