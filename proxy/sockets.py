"""The listening sockets: bound once, by the supervisor, for all workers.

A port in use is found before anything is started.  By TCP every worker has a socket of its own
(SO_REUSEPORT), among which the kernel spreads the connections; a unix socket is one that all share.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from config.schema import Listen, host_port
from proxy.net.listening import UnixListener
from proxy.reachability import reason

BACKLOG = 4096

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # this machine does not have the address


class StartError(Exception):
    """The proxy cannot start; the message says why, and what to do."""


def bind(host: str, port: int, count: int) -> list[list[socket.socket]]:
    """Return `count` sets of listening sockets, in each one socket for each address of `host`.

    Port 0 takes any free one, the same for all.

    Raises
    ------
    StartError
        The name is unknown, or an address is taken.
    """
    sets: list[list[socket.socket]] = [[] for _ in range(count)]
    missing: OSError | None = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
            try:
                # SO_REUSEPORT would let a second proxy in unnoticed, so try without it first.
                with _bound(family, address, port, shared=False) as probe:
                    port = probe.getsockname()[1]
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error  # as "localhost" with IPv6 switched off; its other address will do
                continue
            for sockets in sets:
                sockets.append(_bound(family, address, port, shared=True))
                sockets[-1].listen(BACKLOG)
        if missing and not sets[0]:
            raise missing
    except OSError as error:
        close(sets)
        where = host_port(host, port)
        raise StartError(f"cannot listen on {where}: {reason(error)} (listen.host, listen.port)") from error
    return sets


@contextlib.contextmanager
def bind_unix(listen: Listen, port: int) -> Iterator[UnixListener | None]:
    """Listen on the unix socket of the configuration, if there is one; it is gone afterwards.

    All workers share this one socket: a path has one owner only.

    Raises
    ------
    StartError
        It is in use, or cannot be made.
    """
    if listen.unix_socket is None:
        yield None
        return
    path = listen.unix_socket / f".s.PGSQL.{port}"
    try:
        listener = UnixListener(path, int(listen.unix_socket_mode, 8), BACKLOG)
    except OSError as error:
        why = error.strerror or str(error)
        raise StartError(f"cannot listen on {path}: {why} (listen.unix_socket)") from error
    try:
        yield listener
    finally:
        listener.close()


def _bound(family: int, address: tuple[object, ...], port: int, *, shared: bool) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            both = address[0] == "::"  # "everywhere" includes IPv4
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        bound.bind((address[0], port, *address[2:]))
    except OSError:
        bound.close()
        raise
    return bound


def close(sets: list[list[socket.socket]]) -> None:
    """Close sets of sockets."""
    for sockets in sets:
        for each in sockets:
            each.close()


@contextlib.contextmanager
def closing(sets: list[list[socket.socket]]) -> Iterator[None]:
    """Close them at the end of the block."""
    try:
        yield
    finally:
        close(sets)
