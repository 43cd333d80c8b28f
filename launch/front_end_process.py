"""The entry of a front-end process (`python -m launch.front_end_process`): one of several, started by `front_group`.

It knows its listening socket, the engine's address, the pipes to its owner, and the directory that it shares with the
other front ends.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import EngineError, NanoEngineError, to_wire
from launch.front_dir import FrontDir
from launch.front_end import FrontEnd, keep_what_is_loaded, run_loop
from launch.keys import ApiKeys
from launch.supervisor import configure_server_logging
from nanoengine import AsyncLLM, processes
from nanoengine.engine_status import AttachedEngine
from nanoengine.spawning import read_message
from nanoengine.watched import guard_threads


def main() -> None:
    """Process entry; exits with 0 after SIGTERM, from whomever and however often, and with 1 after a failure."""
    processes.ignore_interrupts()  # the owner decides what Ctrl-C means
    message = read_message("A front end")
    processes.name_process("nano-front")
    for name in ("listener_fd", "status_fd", "death_fd", "report_fd"):
        os.set_inheritable(message[name], False)
    processes.on_end_of(message["death_fd"], lambda: os._exit(1), "death pipe")
    if not processes.set_death_signal(signal.SIGKILL, message["owner_pid"]):
        os._exit(1)
    config = EngineConfig.from_dict(message["config"])
    configure_server_logging(config, message["name"])
    guard_threads(processes.end_process)
    try:
        failure = run_loop(_run(config, message))
    except NanoEngineError as error:
        failure = error
    except Exception as error:
        _report(message, {"error": to_wire(EngineError(f"a front end failed: {type(error).__name__}: {error}"))})
        raise
    if failure is not None:
        _report(message, {"error": to_wire(failure)})
    sys.exit(0 if failure is None else 1)


async def _run(config: EngineConfig, message: dict[str, Any]) -> NanoEngineError | None:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def ask_to_stop() -> None:
        if not stop.done():  # a process group may be signalled as a whole, so one stop may arrive twice
            stop.set_result(None)

    loop.add_signal_handler(signal.SIGTERM, ask_to_stop)
    report = functools.partial(_report, message)
    engine = AsyncLLM(config=config, engine=AttachedEngine(Path(message["run_dir"]), message["status_fd"], report))
    front_dir = FrontDir(Path(message["front_dir"]), message["front_name"])
    keys = ApiKeys(bytes.fromhex(digest) for digest in message["key_digests"])
    with socket.socket(fileno=message["listener_fd"]) as listener:

        def on_ready() -> None:
            keep_what_is_loaded()
            _report(message, {"ready": True})

        return await FrontEnd(engine, listener, keys, stop, on_ready, front_dir).run()


def _report(message: dict[str, Any], report: dict[str, Any]) -> None:
    os.write(message["report_fd"], json.dumps(report).encode() + b"\n")


if __name__ == "__main__":
    main()
