"""Puts routes, errors and guards together into one ASGI app; knows neither sockets nor signals."""

from __future__ import annotations

from fastapi import FastAPI

from launch.server import errors
from launch.server.documents import document
from launch.server.engine import Engine
from launch.server.middleware import ApiKeyGuard, BodyLimit
from launch.server.routes import router
from launch.server.streams import StreamStore
from nanoengine.version import __version__


def create_app(engine: Engine) -> FastAPI:
    """The app over an engine, which may still be loading. The key it asks for is the setting `api_key`."""
    # FastAPI's own pages fetch scripts from another host; the OpenAPI document itself stays.
    app = FastAPI(title="nanoengine", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine = engine
    app.state.streams = StreamStore(engine.config.server.stream_resume_seconds)
    app.include_router(router)
    errors.install(app)
    document(app)
    app.add_middleware(BodyLimit)
    if engine.config.server.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=engine.config.server.api_key)  # outermost: nothing is read without it
    return app
