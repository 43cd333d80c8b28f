"""Runs the server: signals, one front end or several, and one exit code; knows neither routes nor tokens.

One front end runs here, on the main thread's event loop. Several are processes, and this one owns the engine behind
them: it starts, watches and ends them, and passes on that a stop was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
from types import FrameType

from configs.engine import EngineConfig
from configs.errors import NanoEngineError
from launch.front_end import FrontEnd, keep_what_is_loaded, run_loop
from launch.front_group import FrontGroup
from launch.keys import ApiKeys, load_keys
from launch.listener import listening, url_of
from nanoengine import AsyncLLM
from nanoengine.processes import configure_logging, end_process
from nanoengine.watched import guard_threads, watch

logger = logging.getLogger(__name__)

SERVER_DECODE_GAP = 3.0
SERVER_LOG_STATS_INTERVAL = 10.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: EngineConfig) -> int:
    """Serve until a signal or the engine's end; returns the exit code.

    Raises:
        ConfigError: it would listen to other machines without a key, or the keys cannot be read.
        EngineError: the address is not to be had (a busy port, say); nothing was loaded.
        NanoEngineError: what keeps the engine from starting.
    """
    keys, count = load_keys(config.server), config.server.api_server_count
    # From here on the digests do: nothing that is logged, dumped or handed down holds a key.
    config = dataclasses.replace(config, server=dataclasses.replace(config.server, api_key=()))
    with listening(config.server, bool(keys), count) as listeners, Signals() as signals:
        configure_server_logging(config)
        return run_loop(_serve(with_server_defaults(config), listeners, keys, signals))


def configure_server_logging(config: EngineConfig, who: str = "server") -> None:
    """Logging of a process with a front end in it, or of the supervisor of several."""
    configure_logging(config.server.log_level, who, config.server.log_format)
    if config.server.log_level != "debug":
        for name in ("uvicorn", "asyncio"):
            logging.getLogger(name).setLevel(logging.WARNING)


def with_server_defaults(config: EngineConfig) -> EngineConfig:
    """The settings whose default differs for a server: its streams have readers, and so has its log."""
    scheduler, server = config.scheduler, config.server
    if scheduler.max_decode_gap is None:
        scheduler = dataclasses.replace(scheduler, max_decode_gap=SERVER_DECODE_GAP)
    if server.log_stats_interval is None:
        server = dataclasses.replace(server, log_stats_interval=SERVER_LOG_STATS_INTERVAL)
    return dataclasses.replace(config, scheduler=scheduler, server=server)


class Signals:
    """Records SIGINT and SIGTERM; whoever runs the loop acts on them. The second one ends the process at once.

    The children notice that by their death pipe, so nothing is left behind.
    """

    def __init__(self) -> None:
        self._received: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

    def __enter__(self) -> Signals:
        self._before = {number: signal.signal(number, self._record) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._received.append(number)
        if len(self._received) > 1:
            os._exit(128 + number)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Return as soon as there was one."""
        self._loop = asyncio.get_running_loop()
        if not self._received:
            await self._event.wait()


async def _serve(config: EngineConfig, listeners: list[socket.socket], keys: ApiKeys, signals: Signals) -> int:
    guard_threads(end_process)
    url, tp = url_of(config.server, listeners[0]), config.parallel.tensor_parallel_size
    logger.info("listening on %s; loading model %s from %s, tp=%d", url, config.model.model, config.model_dir, tp)

    def say_ready() -> None:
        keep_what_is_loaded()
        with contextlib.suppress(BrokenPipeError):  # a closed stdout is no reason to stop serving
            print(f"nanoengine ready: {url} (model={config.served_model_name}, tp={tp})", flush=True)

    stop = asyncio.create_task(signals.wait())
    watch(stop, "the task that waits for signals")
    try:
        if len(listeners) == 1:
            failure = await FrontEnd(AsyncLLM(config=config), listeners[0], keys, stop, say_ready).run()
        else:
            failure = await FrontGroup(config, listeners, keys, stop, say_ready).run()
        if stop.done():
            stop.result()  # raises what ended it, unless it was a signal
    finally:
        stop.cancel()
    if failure is None:
        logger.info("stopped")
        return 0
    _say_failed(failure)
    return 1


def _say_failed(failure: NanoEngineError) -> None:
    print(f"nanoengine: error: {' '.join(failure.message.split())}", file=sys.stderr)
