"""The page at `/`: its files, which are open to everybody and hold no data, and the JSON of its view of the engine.

The files lie in `static/` and are served as they are. They load nothing from another host and run no inline script,
and the headers here keep the browser to that.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from importlib import resources
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from configs.engine import EngineConfig
from nanoengine.engine_view import EngineView
from nanoengine.messages import BlockMap
from nanoengine.version import __version__

router = APIRouter()

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # No text becomes markup or code: the browser itself refuses innerHTML and the like.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
_HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in _POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for again each time, answered by 304 as long as the server is the same.
    "Cache-Control": "no-cache",
}


@dataclasses.dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str


def _read_files() -> dict[str, _File]:
    """Every file of `static/` by its path."""
    files = {}
    for entry in resources.files(__package__).joinpath("static").iterdir():
        media_type = _TYPES.get("." + entry.name.rpartition(".")[2])
        if media_type is None:
            continue  # what an editor leaves behind
        content, path = entry.read_bytes(), "/" if entry.name == "index.html" else f"/static/{entry.name}"
        files[path] = _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return files


_FILES = _read_files()
# What is served without a key: a fixed set of files, none of which depends on the engine.
PATHS = frozenset(_FILES)


async def _serve_file(request: Request) -> Response:
    file = _FILES[request.scope["route"].path]
    headers = _HEADERS | {"ETag": file.etag}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


for _path in sorted(PATHS):
    router.add_api_route(_path, _serve_file, methods=["GET", "HEAD"], include_in_schema=False)


# -- the view of the engine ---------------------------------------------------------------------------------------


def shown_view(view: EngineView, config: EngineConfig) -> dict[str, Any]:
    """A view as JSON. The columns of a map of blocks are base64 of a byte a cell; latencies are in seconds."""
    state = view.state
    return {
        "version": __version__,
        "model": config.served_model_name,
        "tensor_parallel_size": config.parallel.tensor_parallel_size,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "block_size": config.cache.block_size,
        "incarnation": state.incarnation,
        "time": state.time,
        "num_running": state.num_running,
        "num_waiting": state.num_waiting,
        "num_swapped": state.num_swapped,
        "num_preemptions": state.num_preemptions,
        "num_generated_tokens": state.num_generated_tokens,
        "num_query_tokens": state.num_query_tokens,
        "num_hit_tokens": state.num_hit_tokens,
        "latencies": dataclasses.asdict(view.latencies),
        "device_blocks": _shown_map(state.device),
        "host_blocks": _shown_map(state.host),
        "prefixes": [each._asdict() for each in state.prefixes],
        "prefix_cells": _column(state.prefix_cells),
        "sequences": [each._asdict() for each in state.rows],
    }


def _shown_map(blocks: BlockMap) -> dict[str, Any]:
    columns = {name: _column(getattr(blocks, name)) for name in ("cached", "held", "shared")}
    return blocks._asdict() | columns


def _column(cells: bytes) -> str:
    return base64.b64encode(cells).decode()
