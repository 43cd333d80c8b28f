"""Compiles the C sources beside it into a library, kept in the user's cache; knows nothing of what they compute."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

# What the sources are written for, named one by one: a library in the cache fits any processor that has these.
CPU_FLAGS = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "amx_tile", "amx_bf16")
_OPTIONS = ("-O2", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-mfma") + tuple(
    "-m" + flag.replace("avx512_bf16", "avx512bf16").replace("_", "-") for flag in CPU_FLAGS
)
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 120.0  # seconds; it takes about one


class BuildError(Exception):
    """There is no compiler, or it failed; the message says why."""


def build(cache: Path | None = None) -> Path:
    """The library: from `cache` (default: `default_cache()`) when it was compiled before, else compiled now.

    Several processes may do so at once: each compiles for itself, and the last to finish replaces the file as a whole.

    Raises:
        BuildError: it could not be compiled or kept.
    """
    sources = sorted(Path(__file__).parent.glob("*.c"))
    compiler = find_compiler()
    cache = cache or default_cache()
    library = cache / f"kernels-{_digest(sources, compiler)}.so"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(cache)
        if library.is_file():
            _check_private(library)
            return library
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fresh = Path(folder) / library.name
            _compile([*compiler, *_OPTIONS, *map(str, sources), "-o", str(fresh)])
            fresh.chmod(0o700)
            fresh.replace(library)
    except OSError as error:
        raise BuildError(f"{cache} cannot keep it: {error}") from error
    return library


def default_cache() -> Path:
    """`nanoengine/native` in XDG_CACHE_HOME, which is `~/.cache` by default."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if root.startswith("/") else Path.home() / ".cache") / "nanoengine" / "native"


def find_compiler() -> list[str]:
    """The command of the C compiler: $CC, else the first of the usual ones. Raises BuildError when there is none."""
    named = shlex.split(os.environ.get("CC", ""))
    for command in [named] if named else [[name] for name in _COMPILERS]:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    raise BuildError(f"there is no C compiler ({named[0] if named else ', '.join(_COMPILERS)})")


def _digest(sources: list[Path], compiler: list[str]) -> str:
    """Names a library by all that goes into it."""
    about = Path(compiler[0]).stat()
    digest = hashlib.sha256(repr((compiler, about.st_size, about.st_mtime_ns, _OPTIONS)).encode())
    for path in [*sources, *sorted(Path(__file__).parent.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _check_private(path: Path) -> None:
    """Code is loaded from here: nobody else may write to it. Raises BuildError."""
    about = path.stat()
    if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise BuildError(f"{path} belongs to, or can be written by, somebody else")


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
        raise BuildError(f"{command[0]} failed: {first}")
    logger.info("compiled the CPU kernels with %s", command[0])
