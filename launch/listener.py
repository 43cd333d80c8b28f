"""The address a server listens on: sockets made before anything is loaded; knows neither HTTP nor processes."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

from configs.engine import ServerConfig
from configs.errors import ConfigError, EngineError, NanoEngineError

_BACKLOG = 2048
# A peer that vanished without a word (its machine lost power, a router forgot it) is noticed after a minute or two.
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 120_000}


@contextlib.contextmanager
def listening(server: ServerConfig, has_key: bool, count: int = 1) -> Iterator[list[socket.socket]]:
    """`count` listening sockets on one port, so that a busy port is noticed before anything is loaded.

    The kernel shares connections out among several by their addresses, so that no process gets most of them.

    Raises:
        ConfigError: the address can be reached from other machines, and there is neither a key nor `insecure`.
        EngineError: it cannot be listened on.
    """
    family, address = _resolve(server)
    if not (_is_loopback(address) or has_key or server.insecure):
        raise ConfigError(
            f"host {server.host} can be reached from other machines: set api_key (--api-key KEY), api_key_file or "
            "NANOENGINE_API_KEY, or use 127.0.0.1, or say --insecure",
            "api_key",
        )
    sockets: list[socket.socket] = []
    try:
        if count > 1 and address[1]:
            # Sockets that share a port would share it with those of another server too; this one shares with nobody.
            _bound(server, family, address).close()
        for _ in range(count):
            sockets.append(_bound(server, family, address, shared=count > 1))
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        for each in sockets:
            each.listen(_BACKLOG)
        yield sockets
    finally:
        for each in sockets:
            each.close()


def url_of(server: ServerConfig, listener: socket.socket) -> str:
    """Where clients find it."""
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"http://{host}:{listener.getsockname()[1]}"


def _resolve(server: ServerConfig) -> tuple[socket.AddressFamily, Any]:
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host must be an address of this machine, got {server.host!r} ({error})", "host") from error
    return found[0][0], found[0][4]


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback


def _bound(server: ServerConfig, family: socket.AddressFamily, address: Any, shared: bool = False) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Without it, a restart would wait for the old connections' TIME_WAIT. A port somebody listens on stays busy.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():  # connections inherit them
            if hasattr(socket, name):
                bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        bound.bind(address)
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise _cannot_listen(server, error) from error
    return bound


def _cannot_listen(server: ServerConfig, error: OSError) -> NanoEngineError:
    what = error.strerror or str(error)
    return EngineError(
        f"cannot listen on {server.host} port {server.port}: {what}; choose another port (0: any free one)"
    )
