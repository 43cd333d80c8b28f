"""One front end: HTTP over an AsyncLLM on a listening socket, from loading to draining; knows no signal.

It runs in the command's own process, or as one of several children that `launch.front_end_process` starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import resource
import socket
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import uvicorn

from configs.errors import EngineError, NanoEngineError
from launch.front_dir import FrontDir
from launch.keys import ApiKeys
from launch.server.app import create_app
from launch.server.lifecycle import Lifecycle
from launch.server.protocol import BoundedProtocol
from nanoengine import AsyncLLM
from nanoengine.watched import watch

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long after the engine's end the server still answers, so that each client is told.
LAST_WORDS_SECONDS = 1
# Longer than the 60 s for which proxies keep a connection, so that none sends a request while we close.
KEEP_ALIVE_SECONDS = 75
_WATCH_SECONDS = 0.25
_DRAIN_POLL_SECONDS = 0.02
_MAX_DESCRIPTORS = 65536
_OTHER_DESCRIPTORS = 64


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves the signals to us."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class FrontEnd:
    """Serves an engine's requests; used once, on one event loop.

    Args:
        stop: becomes done when the server shall stop.
        on_ready: called once the engine serves.
        front_dir: see `create_app`; it is listened there as well.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        listener: socket.socket,
        keys: ApiKeys,
        stop: asyncio.Future[None],
        on_ready: Callable[[], None],
        front_dir: FrontDir | None = None,
    ) -> None:
        self._engine, self._stop, self._on_ready = engine, stop, on_ready
        self._listeners = [listener] if front_dir is None else [listener, front_dir.listen()]
        self._lifecycle = Lifecycle()
        self._server = _Server(
            uvicorn.Config(
                create_app(engine, keys, self._lifecycle, front_dir=front_dir),
                http=BoundedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                limit_concurrency=max_connections(),
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=LAST_WORDS_SECONDS,
            )
        )

    async def run(self) -> NanoEngineError | None:
        """Load and serve until the stop, then drain; returns why the engine failed, None after a stop.

        Raises whatever keeps the engine from starting.
        """
        serving = asyncio.create_task(self._server.serve(sockets=self._listeners))
        watch(serving, "the HTTP server")
        try:
            await self._load(serving)
            failure = await self._watch(serving)
            if failure is None:
                failure = await self._drain(serving)
            return failure
        finally:
            self._lifecycle.draining = True
            self._server.should_exit = True
            await self._engine.close()  # what still streams ends with an error that says so
            await asyncio.wait([serving])

    async def _load(self, serving: asyncio.Task[None]) -> None:
        """Start the engine; returns early when a stop is asked for."""
        starting = asyncio.create_task(self._engine.start())
        await asyncio.wait([starting, serving, self._stop], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()  # nobody waits for it any more; `close` breaks it off
            return
        starting.result()
        self._on_ready()

    async def _watch(self, serving: asyncio.Task[None]) -> NanoEngineError | None:
        """Wait for the stop (None), or for the engine's failure, unless the server is to survive it."""
        is_told = False
        while not self._stop.done():
            if self._engine.failure is not None:
                if self._engine.config.server.exit_on_failure:
                    return self._engine.failure
                if not is_told:
                    logger.error("nothing can be served any more: %s", self._engine.failure.message)
                is_told = True
            await asyncio.wait([self._stop, serving], timeout=_WATCH_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            _check_serving(serving)
        return None

    async def _drain(self, serving: asyncio.Task[None]) -> NanoEngineError | None:
        """Take nothing new, and let what is open go on for a while; returns the engine's failure, if it fails now."""
        self._lifecycle.draining = True
        if not self._engine.is_ready and self._engine.recovering_from is None:
            return None
        seconds = self._engine.config.server.shutdown_timeout
        if self._num_open:
            logger.info("stopping; %d open requests may go on for %g s", self._num_open, seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        while self._num_open and self._engine.failure is None:
            if asyncio.get_running_loop().time() >= deadline:
                logger.warning("%d requests are still open after %g s and end with an error", self._num_open, seconds)
                break
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
            _check_serving(serving)
        return self._engine.failure

    @property
    def _num_open(self) -> int:
        # The engine's own count has those whose client may come back for the rest.
        return max(self._lifecycle.num_open, self._engine.num_unfinished)


def _check_serving(serving: asyncio.Task[None]) -> None:
    """Raise what ended the HTTP server before it was told to end."""
    if serving.done():
        serving.result()
        raise EngineError("the HTTP server ended by itself")


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.run, on uvloop's event loop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


def keep_what_is_loaded() -> None:
    """Tell the garbage collector that what this process holds now, it holds to its end.

    A collection that looks at all of it, as one does in a crowd of requests, holds up every stream for some 50 ms.
    """
    gc.collect()
    gc.freeze()


def max_connections() -> int:
    """How many connections this process can hold, with the limit on its descriptors raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    limit = _MAX_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
    return max(1, limit - _OTHER_DESCRIPTORS)
