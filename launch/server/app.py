"""Puts routes, errors and guards together into one ASGI app; knows neither sockets nor signals."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI

from launch.server import errors, exposition
from launch.server.access import ObserveHttp
from launch.server.engine import Engine
from launch.server.metrics import ServerMetrics
from launch.server.middleware import ApiKeyGuard, BodyLimit
from launch.server.routes import router
from launch.server.shared_numbers import SharedNumbers
from nanoengine.version import __version__


def create_app(engine: Engine, *, metrics_dir: Path | None = None) -> FastAPI:
    """The app over an engine, which may still be loading. The key it asks for is the setting `api_key`.

    Args:
        metrics_dir: where several front ends of the same engine keep their numbers, so that `/metrics` of each one
            shows the sum; made if it is not there. None for a front end that is alone.
    """
    # FastAPI's own pages fetch scripts from another host; the OpenAPI document itself stays.
    app = FastAPI(title="nanoengine", version=__version__, docs_url=None, redoc_url=None)
    app.state.engine = engine
    max_model_len = engine.config.max_model_len
    engine.recorder = metrics = ServerMetrics(max_model_len)
    shared = None if metrics_dir is None else SharedNumbers(metrics_dir, metrics, max_model_len)
    app.state.metrics_registry = exposition.make_registry(engine, metrics, shared)
    app.include_router(router)
    app.include_router(exposition.router)
    errors.install(app)
    app.add_middleware(BodyLimit)
    if engine.config.server.api_key is not None:
        app.add_middleware(ApiKeyGuard, api_key=engine.config.server.api_key)  # outermost: nothing is read without it
    app.add_middleware(ObserveHttp, metrics=metrics, access_log=engine.config.server.access_log)  # sees all of it
    return app
