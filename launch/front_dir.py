"""The directory that the front ends of one server share: their sockets, and who keeps which stream; no HTTP in here.

It lies in the engine's private directory and ends with it. Each front end listens on a Unix socket of its own in
there, through which the others reach it: on the server's port the kernel chooses who answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from pathlib import Path

from nanoengine.listener import check_socket_path

_SUFFIX = ".http"
_BACKLOG = 128


class FrontDir:
    """The directory, as the front end `name` sees it; made if it is not there.

    A stream is claimed by a symbolic link that is named after it and points to its keeper's name: making one is atomic,
    so of two front ends one gets it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self._claims = path / "streams"
        for each in (path, self._claims):
            each.mkdir(mode=0o700, exist_ok=True)

    @property
    def metrics(self) -> Path:
        """Where each keeps its numbers; not made here."""
        return self._path / "metrics"

    def listen(self) -> socket.socket:
        """This front end's socket. Raises ConfigError when its path is too long for the system."""
        path = self._socket(self._name)
        check_socket_path(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        return listener

    def others(self) -> list[Path]:
        """The sockets of the other front ends. One that has died may be among them."""
        own = self._socket(self._name)
        return sorted(each for each in self._path.glob("*" + _SUFFIX) if each != own)

    def claim(self, stream_id: str) -> bool:
        """Say that the stream is kept here; False when another front end has one of this id."""
        try:
            os.symlink(self._name, self._claim(stream_id))
        except FileExistsError:
            return self._keeper(stream_id) == self._name
        return True

    def release(self, stream_id: str) -> None:
        """Give up a claim. Harmless twice, and without one."""
        if self._keeper(stream_id) == self._name:
            self._claim(stream_id).unlink(missing_ok=True)

    def elsewhere(self, stream_id: str) -> Path | None:
        """The socket of the other front end that keeps the stream; None when there is none."""
        keeper = self._keeper(stream_id)
        return None if keeper is None or keeper == self._name else self._socket(keeper)

    def clear(self) -> None:
        """Remove what this front end, which has died, has left."""
        self._socket(self._name).unlink(missing_ok=True)
        for claim in self._claims.iterdir():
            with contextlib.suppress(FileNotFoundError):  # released meanwhile, by one that lives
                if os.readlink(claim) == self._name:
                    claim.unlink()

    def _socket(self, name: str) -> Path:
        return self._path / (name + _SUFFIX)

    def _claim(self, stream_id: str) -> Path:
        # A client may ask for any id; the digest is one name in this folder, whatever was asked for.
        return self._claims / hashlib.blake2b(stream_id.encode(errors="replace"), digest_size=16).hexdigest()

    def _keeper(self, stream_id: str) -> str | None:
        with contextlib.suppress(OSError):
            return os.readlink(self._claim(stream_id))
        return None
