"""Puts routes, errors and guards together into one ASGI app; knows neither sockets nor signals."""

from __future__ import annotations

from fastapi import FastAPI

from launch.keys import ApiKeys
from launch.server import errors
from launch.server.documents import document
from launch.server.engine import Engine
from launch.server.lifecycle import CountOpen, Lifecycle
from launch.server.middleware import ApiKeyGuard, BodyLimit, HeaderLimit
from launch.server.request_id import RequestIds
from launch.server.routes import router
from launch.server.streams import StreamStore
from nanoengine.version import __version__


def create_app(engine: Engine, keys: ApiKeys | None = None, lifecycle: Lifecycle | None = None) -> FastAPI:
    """The app over an engine, which may still be loading.

    Args:
        keys: what it asks for; None: the setting `api_key` alone.
        lifecycle: what the routes obey while the server stops.
    """
    keys = ApiKeys.of(engine.config.server.api_key) if keys is None else keys
    # FastAPI's own pages fetch scripts from another host; the OpenAPI document itself stays.
    app = FastAPI(title="nanoengine", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.streams = StreamStore(engine.config.server.stream_resume_seconds)
    app.state.lifecycle = lifecycle or Lifecycle()
    app.include_router(router)
    errors.install(app)
    document(app)
    # The last one added is the first to see a request: nothing is read of one without a key.
    app.add_middleware(BodyLimit)
    app.add_middleware(CountOpen, lifecycle=app.state.lifecycle)
    if keys:
        app.add_middleware(ApiKeyGuard, keys=keys)
    app.add_middleware(HeaderLimit)
    app.add_middleware(RequestIds)
    return app
