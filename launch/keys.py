"""The API keys that clients may show: where they come from, and whether one of them was shown; knows no request.

Only digests are kept, so that no log line, dump or child process can give a key away.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, MutableMapping
from pathlib import Path

from configs.engine import ServerConfig
from configs.errors import ConfigError

logger = logging.getLogger(__name__)

KEY_VARIABLE = "NANOENGINE_API_KEY"
MAX_KEY_BYTES = 1024


class ApiKeys:
    """Digests of the keys that are accepted; false when there is none, and then nothing is asked for."""

    def __init__(self, digests: Iterable[bytes] = ()) -> None:
        self.digests = tuple(digests)

    @classmethod
    def of(cls, keys: Iterable[str]) -> ApiKeys:
        """The digests of keys in plain text."""
        return cls(_digest(key.encode()) for key in dict.fromkeys(keys))

    def __bool__(self) -> bool:
        return bool(self.digests)

    def __repr__(self) -> str:
        return f"ApiKeys({len(self.digests)} keys)"

    def accept(self, given: bytes) -> bool:
        """Whether it is one of the keys, in a time that depends neither on which one nor on how much of it is right."""
        digest, found = _digest(given[: MAX_KEY_BYTES + 1]), False
        for each in self.digests:
            found |= hmac.compare_digest(digest, each)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def load_keys(server: ServerConfig, environ: MutableMapping[str, str] = os.environ) -> ApiKeys:
    """The keys of the settings, of the key file and of the environment together.

    The variable is taken out of `environ`, so that no child process inherits it.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key could not be sent in a header.
    """
    keys = list(server.api_key)
    if server.api_key_file is not None:
        keys += _from_file(Path(server.api_key_file))
    # A key holds neither blanks nor commas, so both may separate several.
    keys += environ.pop(KEY_VARIABLE, "").replace(",", " ").split()
    for number, key in enumerate(keys, start=1):
        if len(key.encode()) > MAX_KEY_BYTES or not key.isprintable() or any(each in key for each in " ,"):
            raise ConfigError(
                f"an API key must be up to {MAX_KEY_BYTES} bytes without blanks, commas and control characters; "
                f"key {number} of {len(keys)} is not", "api_key",
            )  # fmt: skip
    return ApiKeys.of(keys)


def _from_file(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as file:
            mode, lines = os.fstat(file.fileno()).st_mode, file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"api_key_file {path} cannot be read: {reason}", "api_key_file") from None
    # A key may hold a #, but no blank: what stands behind a blank and a # is a comment too.
    keys = [line.split(" #")[0].strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key: write one on a line of its own", "api_key_file")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("other users of this machine can read the keys in %s: chmod 600 would keep them out", path)
    return keys
