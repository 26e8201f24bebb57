"""What a service manager gives the daemon, a socket that it listens on for us, and is told: that we serve.

Sources: sd_listen_fds(3), sd_notify(3). Both are a few lines, so no library is needed for them.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping

from runtimes.process import SERVICE_VARIABLES
from sandboxd.failures import InvalidArgument

logger = logging.getLogger(__name__)

HANDOVER_NAME = "sandboxd-handover"
"""What a socket is called that comes from the daemon before: as in ``client.starting``, which passes it."""

FIRST_FD = 3
"""Where passed descriptors begin: SD_LISTEN_FDS_START."""

LISTEN_FDS_MAX = 64

TELL_S_MAX = 1.0
"""A service manager whose queue is full must not hold up who serves."""

USEC_DIGITS_MAX = 16
"""Three centuries."""


class Activation:
    """What the daemon was started as. Everything in it is empty for one that no service manager started."""

    def __init__(
        self,
        listening: socket.socket | None,
        notify_address: str,
        watchdog_s: float | None = None,
        *,
        handed_over: bool = False,
    ) -> None:
        self.listening = listening
        self.handed_over = handed_over
        """The socket is from the daemon before us, and not a service manager's own."""
        self.watchdog_s = watchdog_s
        """How long it may go without being told that all is well; None: it does not watch."""
        self._notify_address = notify_address

    @property
    def listens(self) -> bool:
        """Whether there is somebody to be told."""
        return bool(self._notify_address)

    def tell(self, state: str) -> None:
        """Tell the service manager, as in ``READY=1``. Nothing where none listens; that is never a failure."""
        if not self._notify_address:
            return
        address = self._notify_address
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(TELL_S_MAX)
            try:
                sender.sendto(state.encode(), address)
            except OSError as error:
                logger.warning("cannot tell the service manager %s: %s", state, error)


def take_over(environ: MutableMapping[str, str]) -> Activation:
    """Take what a service manager passed, and take its variables away: nothing that we start is that service.

    Args:
        environ: ``os.environ``. What was taken from it is gone from it.

    Raises:
        InvalidArgument: something else was passed than one listening Unix stream socket.
    """
    told = {name: environ.pop(name) for name in SERVICE_VARIABLES if name in environ}
    own = str(os.getpid())
    address = told.get("NOTIFY_SOCKET", "")
    # A daemon that a client started from within a service has that service's variables, and is not that service.
    if address[:1] not in {"/", "@"} or told.get("SYSTEMD_EXEC_PID", own) != own:
        address = ""
    listening = _listening_socket(told) if told.get("LISTEN_PID") == own else None
    watched = address and told.get("WATCHDOG_PID", own) == own
    return Activation(
        listening,
        address,
        _seconds(told.get("WATCHDOG_USEC", "")) if watched else None,
        handed_over=listening is not None and told.get("LISTEN_FDNAMES") == HANDOVER_NAME,
    )


def _seconds(usec: str) -> float | None:
    """A number of microseconds; None: it is none, or nothing."""
    fits = usec.isascii() and usec.isdigit() and len(usec) <= USEC_DIGITS_MAX
    return int(usec) / 1e6 if fits and int(usec) else None


def _listening_socket(told: MutableMapping[str, str]) -> socket.socket | None:
    text = told.get("LISTEN_FDS", "")
    count = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(LISTEN_FDS_MAX)) else 0
    if count == 0:
        return None
    for number in range(FIRST_FD, FIRST_FD + count):
        os.set_inheritable(number, False)
    try:
        listening = socket.socket(fileno=FIRST_FD)
    except OSError as error:
        raise _refusal("it passed something else than a socket", None) from error
    if count > 1:
        raise _refusal(f"it passed {count} sockets", listening)
    if listening.family != socket.AF_UNIX or listening.type != socket.SOCK_STREAM:
        raise _refusal("it passed something else than a Unix stream socket", listening)
    if not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise _refusal("it passed a socket that does not listen (Accept=yes?)", listening)
    path = listening.getsockname()
    if not isinstance(path, str) or not os.path.isabs(path):
        raise _refusal("it passed a socket that has no path", listening)
    return listening


def _refusal(detail: str, listening: socket.socket | None) -> InvalidArgument:
    if listening is not None:
        listening.close()
    return InvalidArgument(
        "cannot listen on what the service manager passed", detail=detail, hint="sandboxctl daemon install"
    )
