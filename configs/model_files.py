"""Opens the files of a model directory as data: regular, of a bounded size, and inside; knows none of their formats.

A directory that comes from somewhere else may hold anything. A link that leads out of it would show a client, through a
chat template say, what only the server's user may read; a pipe would never end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.errors import ModelError

MAX_JSON_BYTES = 16 * 2**20


def check_inside(path: Path, root: Path, kind: type[ModelError]) -> None:
    """Raise `kind` unless `path`, where it is a link, leads to somewhere in `root`.

    In a Hugging Face cache, `snapshots/REVISION` holds links to the `blobs` beside `snapshots`.
    """
    home, real = root.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in allowed):
        raise kind(f"{path} is a link to {real}, out of the model's directory; copy the file, or name its directory")


def read_text(path: Path, root: Path, kind: type[ModelError], limit: int = MAX_JSON_BYTES) -> str:
    """The text of a file below `root`. Raises `kind` when it is no regular file of at most `limit` bytes of UTF-8."""
    check_inside(path, root, kind)
    if not path.is_file():
        raise kind(f"{path} is no regular file")
    try:
        if path.stat().st_size > limit:
            raise kind(f"{path} is larger than {limit} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"cannot read {path}: {error}") from error


def read_json_object(path: Path, root: Path, kind: type[ModelError], limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file, as `read_text`. Raises `kind` also for anything else."""
    try:
        data = json.loads(read_text(path, root, kind, limit))
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise kind(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data
