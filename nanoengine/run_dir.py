"""The private directory of one engine: made, locked, removed, and swept when whoever held it is gone.

Each of the engine's schedulers has a part of its own in it. It knows nothing of the sockets and stores inside. `flock`
tells the living from the dead: the lock belongs to an open file that owner and scheduler share, so it falls when both
are gone, whichever way they went.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from pathlib import Path

from configs.errors import ConfigError
from nanoengine.listener import MAX_SOCKET_PATH, UNFINISHED

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
_LONGEST_SOCKET_NAME = len("99999/g99999r63" + UNFINISHED)
_UNFINISHED = ".new"
_UNFINISHED_SECONDS = 60


class RunDir:
    """A directory of mode 0700 with a random name, locked for as long as `lock_fd` is open in any process."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path, self.lock_fd = path, lock_fd

    @classmethod
    def create(cls) -> RunDir:
        """Make a new one, after sweeping those that nobody holds any more.

        Raises:
            ConfigError: no base directory is usable; the message says why for each.
        """
        reasons = []
        for base in _bases():
            sweep(base)
            name = f"{_prefix()}{secrets.token_hex(6)}"
            length = len(os.fsencode(base / name)) + 1 + _LONGEST_SOCKET_NAME
            if length > MAX_SOCKET_PATH:
                reasons.append(f"{base} (a socket's path would have {length} bytes of {MAX_SOCKET_PATH})")
                continue
            try:
                return cls._create(base, name)
            except OSError as error:
                reasons.append(f"{base} ({error.strerror})")
        raise ConfigError(
            f"no directory for sockets can be made; set XDG_RUNTIME_DIR or TMPDIR. Tried {'; '.join(reasons)}"
        )

    @classmethod
    def _create(cls, base: Path, name: str) -> RunDir:
        # It gets its name once it is locked: a sweep in between would take it for an abandoned one.
        unfinished = base / (name + _UNFINISHED)
        unfinished.mkdir(mode=0o700)
        lock_fd = os.open(unfinished / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unfinished.rename(base / name)
        return cls(base / name, lock_fd)

    def make_part(self, incarnation: int) -> Path:
        """Make the directory of a scheduler. Raises OSError."""
        path = self.path / str(incarnation)
        path.mkdir(mode=0o700)
        return path

    def remove(self) -> None:
        """Remove the directory and give up the lock. Harmless twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.lock_fd >= 0:
            os.close(self.lock_fd)
            self.lock_fd = -1


def sweep(base: Path) -> None:
    """Remove this user's run directories in `base` whose lock nobody holds."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(base):
            if entry.name.startswith(_prefix()) and _is_ours(Path(entry.path)) and _is_abandoned(Path(entry.path)):
                shutil.rmtree(entry.path, ignore_errors=True)
                logger.info("removed %s, which a killed engine had left", entry.path)


def _is_ours(path: Path) -> bool:
    with contextlib.suppress(OSError):
        status = path.lstat()  # lstat: a link planted under our name is not followed
        return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
    return False


def _is_abandoned(path: Path) -> bool:
    if path.name.endswith(_UNFINISHED):
        with contextlib.suppress(OSError):
            return time.time() - path.lstat().st_mtime > _UNFINISHED_SECONDS
        return False
    try:
        fd = os.open(path / LOCK_NAME, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # named after it was locked, so the lock is gone because somebody was removing it
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def _prefix() -> str:
    return f"nanoengine-{os.getuid()}-"


def _bases() -> list[Path]:
    """Where run directories may live, best first. /tmp comes last, for a TMPDIR too long for sockets."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [Path(runtime)] if os.path.isabs(runtime) and _is_ours(Path(runtime)) else []
    return list(dict.fromkeys([*bases, Path(tempfile.gettempdir()), Path("/tmp")]))
