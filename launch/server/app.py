"""Puts routes, errors and guards together into one ASGI app; knows neither sockets nor signals."""

from __future__ import annotations

from fastapi import FastAPI

from launch.front_dir import FrontDir
from launch.keys import ApiKeys
from launch.server import errors, exposition, page
from launch.server.access import ObserveHttp
from launch.server.documents import document
from launch.server.engine import Engine
from launch.server.lifecycle import CountOpen, Lifecycle
from launch.server.metrics import ServerMetrics
from launch.server.middleware import ApiKeyGuard, BodyLimit, HeaderLimit
from launch.server.pacing import BeginInTurns
from launch.server.request_id import RequestIds
from launch.server.routes import router
from launch.server.shared_numbers import SharedNumbers
from launch.server.streams import StreamStore
from nanoengine.version import __version__


def create_app(
    engine: Engine,
    keys: ApiKeys | None = None,
    lifecycle: Lifecycle | None = None,
    *,
    front_dir: FrontDir | None = None,
) -> FastAPI:
    """The app over an engine, which may still be loading.

    Args:
        keys: what it asks for; None: the setting `api_key` alone.
        lifecycle: what the routes obey while the server stops.
        front_dir: what several front ends of the same engine share, so that `/metrics` and `/load` of each one show
            the sum, and a stream may be resumed through any of them. None for a front end that is alone.
    """
    keys = ApiKeys.of(engine.config.server.api_key) if keys is None else keys
    # FastAPI's own pages fetch scripts from another host; the OpenAPI document itself stays.
    app = FastAPI(title="nanoengine", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.front_dir = front_dir
    app.state.streams = StreamStore(engine.config.server.stream_resume_seconds, front_dir=front_dir)
    app.state.lifecycle = lifecycle or Lifecycle()
    max_model_len = engine.config.max_model_len
    engine.recorder = metrics = ServerMetrics(max_model_len)
    shared = None if front_dir is None else SharedNumbers(front_dir.metrics, metrics, max_model_len)
    app.state.metrics_registry = exposition.make_registry(engine, metrics, shared)
    app.include_router(router)
    app.include_router(page.router)
    app.include_router(exposition.router)
    errors.install(app)
    document(app)
    # The last one added is the first to see a request: nothing is read of one without a key.
    app.add_middleware(BodyLimit)
    app.add_middleware(BeginInTurns)
    app.add_middleware(CountOpen, lifecycle=app.state.lifecycle)
    if keys:
        app.add_middleware(ApiKeyGuard, keys=keys)
    app.add_middleware(HeaderLimit)
    app.add_middleware(RequestIds)
    app.add_middleware(ObserveHttp, metrics=metrics, access_log=engine.config.server.access_log)
    return app
