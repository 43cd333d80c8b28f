"""Starts a front end, acts on signals and on the engine's end, and stops everything; knows neither routes nor tokens.

With one front end there is no process to supervise: it runs here, on the main thread's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from types import FrameType

import uvicorn

from configs.engine import EngineConfig, ServerConfig
from configs.errors import ConfigError, EngineError, NanoEngineError
from launch.server.app import create_app
from nanoengine import AsyncLLM
from nanoengine.processes import configure_logging

logger = logging.getLogger(__name__)

# Streams that are open when a stop is asked for may go on this long.
DRAIN_SECONDS = 5
# How long after the engine's end the server still answers, so that each client is told.
_LAST_WORDS_SECONDS = 1
_WATCH_SECONDS = 0.25
SERVER_DECODE_GAP = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(config: EngineConfig) -> int:
    """Serve until a signal or the engine's end; returns the exit code.

    Raises:
        ConfigError: it would listen to other machines without a key.
        EngineError: the address is not to be had (a busy port, say); nothing was loaded.
        NanoEngineError: what keeps the engine from starting.
    """
    with contextlib.closing(listen(config.server)) as listener, Signals() as signals:
        configure_logging(config.server.log_level, "server")
        if config.server.log_level != "debug":
            for name in ("uvicorn", "asyncio"):
                logging.getLogger(name).setLevel(logging.WARNING)
        return asyncio.run(_serve(config, listener, signals))


def with_server_defaults(config: EngineConfig) -> EngineConfig:
    """The settings whose default differs for a server: its streams have readers."""
    if config.scheduler.max_decode_gap is not None:
        return config
    scheduler = dataclasses.replace(config.scheduler, max_decode_gap=SERVER_DECODE_GAP)
    return dataclasses.replace(config, scheduler=scheduler)


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


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(config: EngineConfig, listener: socket.socket, signals: Signals) -> int:
    engine = AsyncLLM(config=with_server_defaults(config))
    server = _Server(
        uvicorn.Config(
            create_app(engine),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    stop = asyncio.create_task(signals.wait())
    try:
        await _start(engine, config, listener, serving, stop)
        return await _watch(engine, serving, stop)
    finally:
        stop.cancel()
        drain = DRAIN_SECONDS if engine.num_unfinished else 0
        server.config.timeout_graceful_shutdown = drain + _LAST_WORDS_SECONDS
        server.should_exit = True
        if drain:
            await asyncio.wait([serving], timeout=drain)
        await engine.close()  # what still streams ends with an error that says so
        await asyncio.wait([serving])


async def _start(
    engine: AsyncLLM,
    config: EngineConfig,
    listener: socket.socket,
    serving: asyncio.Task[None],
    stop: asyncio.Task[None],
) -> None:
    """Load the model and say so once it serves; returns early when a stop is asked for."""
    url, tp = _url(config.server, listener), config.parallel.tensor_parallel_size
    logger.info("listening on %s; loading model %s from %s, tp=%d", url, config.model.model, config.model_dir, tp)
    starting = asyncio.create_task(engine.start())
    await asyncio.wait([starting, serving, stop], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()  # nobody waits for it any more; `close` breaks it off
        return
    starting.result()
    with contextlib.suppress(BrokenPipeError):  # a closed stdout is no reason to stop serving
        print(f"nanoengine ready: {url} (model={config.served_model_name}, tp={tp})", flush=True)


async def _watch(engine: AsyncLLM, serving: asyncio.Task[None], stop: asyncio.Task[None]) -> int:
    """Wait for what ends the server; returns the exit code."""
    is_told = False
    while not stop.done() and not serving.done():
        if engine.failure is not None and not is_told:
            print(f"nanoengine: error: {' '.join(engine.failure.message.split())}", file=sys.stderr, flush=True)
            if engine.config.server.exit_on_failure:
                return 1
            is_told = True
        await asyncio.wait([stop, serving], timeout=_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    if stop.done():
        logger.info("stopping")
        return 0
    serving.result()
    raise EngineError("the HTTP server ended by itself")


# -- the address ------------------------------------------------------------------------------------------------


def listen(server: ServerConfig) -> socket.socket:
    """A listening socket, made before anything is loaded, so that a busy port is noticed at once.

    Raises:
        ConfigError: the address can be reached from other machines, and there is no key.
        EngineError: it cannot be listened on.
    """
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host must be an address of this machine, got {server.host!r} ({error})", "host") from error
    family, kind, protocol, _, address = found[0]
    if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback and server.api_key is None:
        raise ConfigError(
            f"host {server.host} can be reached from other machines: set api_key (--api-key KEY), or use 127.0.0.1",
            "api_key",
        )
    listener = socket.socket(family, kind, protocol)
    try:
        # Without it, a restart would wait for the old connections' TIME_WAIT. A port somebody listens on stays busy.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise _cannot_listen(server, error) from error
    return listener


def _cannot_listen(server: ServerConfig, error: OSError) -> NanoEngineError:
    what = error.strerror or str(error)
    return EngineError(
        f"cannot listen on {server.host} port {server.port}: {what}; choose another port (0: any free one)"
    )


def _url(server: ServerConfig, listener: socket.socket) -> str:
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{listener.getsockname()[1]}"
