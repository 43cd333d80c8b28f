"""Has the kernel read a model's weights into its cache while nobody asks for them yet; it looks at none of them."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

_PIECE = 1 << 26
_SINGLE = "model.safetensors"


def read_ahead(model_dir: Path) -> None:
    """Read the safetensors files of a directory, in the order of their names, and keep nothing of them.

    `sendfile` to nowhere copies no byte and lets other threads run: the disk is at work while a rank imports its code,
    and goes on ahead of what the rank reads. What cannot be read is left to whoever loads it to complain about. Files
    that do not fit the memory twice, here and in the form that is computed with, are left alone.
    """
    single = model_dir / _SINGLE
    paths = [single] if single.is_file() else sorted(model_dir.glob("*.safetensors"))
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
        files = []
        for path in paths:
            files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            stack.callback(os.close, files[-1])
        if not all(stat.S_ISREG(os.fstat(file).st_mode) for file in files):
            return
        if 2 * sum(os.fstat(file).st_size for file in files) > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE"):
            return
        nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, nowhere)
        for file in files:
            _read(file, nowhere)


def _read(file: int, nowhere: int) -> None:
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    position = 0
    while sent := os.sendfile(nowhere, file, position, _PIECE):
        position += sent
