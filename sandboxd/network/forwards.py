"""Places on the host that lead to a port inside a sandbox: sockets of ours, and connections that its init dials."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Awaitable, Callable

from runtimes.init.channel import SocketRefused
from runtimes.init.wire import InitError
from sandboxd.egress_rules import address_of
from sandboxd.failures import Conflict, Failure, InvalidArgument
from sandboxd.network.streams import LISTEN_BACKLOG, Traffic, relay

IDLE_S = 3600.0
UNIX_PATH_BYTES_MAX = 107

Dial = Callable[[int, bool], Awaitable[socket.socket]]
"""Port, and whether by IPv6."""


def listen_on_port(address: str, port: int) -> socket.socket:
    """A listening socket on an address of this host.

    Raises:
        InvalidArgument: it is no address of this host.
        Conflict: the port is taken.
        Failure: this user may not.
    """
    parsed = address_of(address)
    if parsed is None:
        raise InvalidArgument(f"cannot listen on {address!r}", detail="it is no IP address", hint="127.0.0.1")
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((str(parsed), port))
        listening.listen(LISTEN_BACKLOG)
    except OSError as error:
        listening.close()
        brief = f"cannot listen on {address} port {port}"
        if error.errno == errno.EADDRINUSE:
            raise Conflict(brief, detail="something listens there", hint="choose another port, or 0") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise InvalidArgument(brief, detail="it is no address of this host") from error
        raise Failure(brief, detail=error.strerror or "") from error
    return listening


def listen_on_path(path: str) -> socket.socket:
    """A listening Unix socket for this user alone; one that nobody listens on any more is replaced.

    Raises:
        InvalidArgument: it is no absolute path, or too long for the kernel.
        Conflict: there is something else.
        Failure: this user may not.
    """
    brief = f"cannot listen on {path!r}"
    if not os.path.isabs(path) or len(os.fsencode(path)) > UNIX_PATH_BYTES_MAX or "\0" in path:
        raise InvalidArgument(brief, detail=f"give an absolute path of at most {UNIX_PATH_BYTES_MAX} bytes")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if _is_left_over(path):
            os.unlink(path)
        # Before there is anything to connect to: between bind and chmod others could.
        os.fchmod(listening.fileno(), 0o600)
        listening.bind(path)
        os.chmod(path, 0o600)
        listening.listen(LISTEN_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(brief, detail="there is something already") from error
        raise Failure(brief, detail=error.strerror or "") from error
    return listening


def _is_left_over(path: str) -> bool:
    """Whether it is a socket of this user's on which nobody listens."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != os.geteuid():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def remove_path(path: str) -> None:
    """Remove the socket of a forward that was closed."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


async def serve_forward(dial: Dial, port: int, accepted: socket.socket) -> None:
    """Pass one connection on to a port inside; it is reset where nobody listens."""
    try:
        inside = await _dial_either(dial, port)
    except (InitError, Failure):
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return
    with inside:
        await relay(accepted, inside, Traffic(), idle_s=IDLE_S)


async def _dial_either(dial: Dial, port: int) -> socket.socket:
    try:
        return await dial(port, False)
    except SocketRefused as error:
        if error.errno != errno.ECONNREFUSED:
            raise
    return await dial(port, True)
