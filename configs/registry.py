"""Maps a model's name to a local directory; knows neither what lies there nor on which device it will live.

A short name is looked up in `model_paths.yaml` (and first in the user's own file, named by the environment
variable NANOENGINE_MODEL_PATHS), a directory is taken as it is, and a name with a slash is looked up in the local
Hugging Face cache. Only `allow_download` lets huggingface_hub fetch anything.
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from configs.errors import ConfigError, ModelError, UnknownModelError

_HERE = Path(__file__).resolve().parent
_BUILT_IN = _HERE / "model_paths.yaml"


def load_model_path(name: str, allow_download: bool = False) -> str:
    """The absolute directory of a model.

    Raises:
        UnknownModelError: nothing is known under that name; the message lists the known ones.
        ModelError: the registered directory does not exist, or a download failed.
        ConfigError: the user's registry file is missing or malformed.
    """
    known = known_models()
    if name in known:
        path = known[name]
        if not path.is_dir():
            raise ModelError(f"the registry maps model {name!r} to {path}, which is not a directory")
        return str(path)
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") != 1
    if "/" in name and not looks_like_path:
        return _from_hub(name, allow_download)
    kind = "no such directory" if "/" in name else "unknown model"
    raise UnknownModelError(
        f"{kind}: {name!r}; known models: {', '.join(sorted(known))}, or the path of a model directory"
    )


def known_models() -> dict[str, Path]:
    """Short names and their directories; the user's file wins over the built-in one."""
    models = _read_paths(_BUILT_IN)
    own = os.environ.get("NANOENGINE_MODEL_PATHS")
    if own:
        models |= _read_paths(Path(own).expanduser())
    return models


def _read_paths(path: Path) -> dict[str, Path]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the model registry {path}: {error}", "NANOENGINE_MODEL_PATHS") from error
    if not isinstance(data, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in data.items()):
        raise ConfigError(f"the model registry {path} must map names to directories", "NANOENGINE_MODEL_PATHS")
    # A relative directory is relative to the file that names it.
    return {name: (path.resolve().parent / Path(where).expanduser()).resolve() for name, where in data.items()}


def _from_hub(name: str, allow_download: bool) -> str:
    cached = _cached_snapshot(name)
    if cached is not None:
        return cached
    if not allow_download:
        raise UnknownModelError(
            f"{name!r} is not in the local Hugging Face cache; fetch it first, or pass "
            f"allow_download (--allow-download); known models: {', '.join(sorted(known_models()))}"
        )
    # huggingface_hub is wanted for this one call only, and only when the user asked for it.
    import importlib

    hub = importlib.import_module("huggingface_hub")
    try:
        return str(
            hub.snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"])
        )
    except Exception as error:  # the hub's client raises many kinds; all mean the same to the user
        raise ModelError(f"could not download {name!r}: {type(error).__name__}: {error}") from error


def _cached_snapshot(name: str) -> str | None:
    """The newest complete snapshot in the hub's cache layout (models--ORG--NAME/snapshots/REV)."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()
    root = cache / ("models--" + name.replace("/", "--"))
    main = root / "refs" / "main"
    if main.is_file():
        snapshot = root / "snapshots" / main.read_text(encoding="utf-8").strip()
        if (snapshot / "config.json").is_file():
            return str(snapshot)
    found = [path.parent for path in (root / "snapshots").glob("*/config.json")]
    return str(max(found, key=lambda path: path.stat().st_mtime)) if found else None
