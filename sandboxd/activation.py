"""What a service manager gives the daemon, a socket that it listens on for us, and is told: that we serve.

Sources: sd_listen_fds(3), sd_notify(3). Both are a few lines, so no library is needed for them.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Mapping, MutableMapping, Sequence

from runtimes.process import SERVICE_VARIABLES
from sandboxd.failures import InvalidArgument
from sandboxd.kept_inputs import PREFIX, KeptInputs

logger = logging.getLogger(__name__)

HANDOVER_NAME = "sandboxd-handover"
"""What a socket is called that comes from the daemon before: as in ``client.starting``, which passes it."""

FIRST_FD = 3
"""Where passed descriptors begin: SD_LISTEN_FDS_START."""

LISTEN_FDS_MAX = 999

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
        kept: Mapping[str, int] | None = None,
    ) -> None:
        self.listening = listening
        self.kept = KeptInputs(kept or {})
        """What a daemon before has left."""
        self.handed_over = handed_over
        """The socket is from the daemon before us, and not a service manager's own."""
        self.watchdog_s = watchdog_s
        """How long it may go without being told that all is well; None: it does not watch."""
        self._notify_address = notify_address

    @property
    def listens(self) -> bool:
        """Whether there is somebody to be told."""
        return bool(self._notify_address)

    def store(self, name: str, descriptor: int) -> None:
        """Have the service manager keep a copy of a descriptor, and pass it to the next daemon under this name."""
        self.tell(f"FDSTORE=1\nFDNAME={name}", [descriptor])

    def unstore(self, name: str) -> None:
        """Have the service manager close its copy."""
        self.tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    def tell(self, state: str, descriptors: Sequence[int] = ()) -> None:
        """Tell the service manager, as in ``READY=1``. Nothing where none listens; that is never a failure."""
        if not self._notify_address:
            return
        address = self._notify_address
        if address.startswith("@"):
            address = "\0" + address[1:]
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
            sender.settimeout(TELL_S_MAX)
            try:
                rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
                sender.sendmsg([state.encode()], [rights] if descriptors else [], 0, address)
            except OSError as error:
                logger.warning("cannot tell the service manager %s: %s", state, error)


def take_over(environ: MutableMapping[str, str]) -> Activation:
    """Take what a service manager passed, and take its variables away: nothing that we start is that service.

    Args:
        environ: ``os.environ``. What was taken from it is gone from it.

    Raises:
        InvalidArgument: something else was passed than one listening Unix stream socket and what a daemon has left.
    """
    told = {name: environ.pop(name) for name in SERVICE_VARIABLES if name in environ}
    own = str(os.getpid())
    address = told.get("NOTIFY_SOCKET", "")
    # A daemon that a client started from within a service has that service's variables, and is not that service.
    if address[:1] not in {"/", "@"} or told.get("SYSTEMD_EXEC_PID", own) != own:
        address = ""
    passed = _passed(told) if told.get("LISTEN_PID") == own else []
    kept = {name: number for name, number in passed if name.startswith(PREFIX)}
    others = [(name, number) for name, number in passed if name not in kept]
    watched = address and told.get("WATCHDOG_PID", own) == own
    return Activation(
        _listening_socket([number for _, number in others]),
        address,
        _seconds(told.get("WATCHDOG_USEC", "")) if watched else None,
        handed_over=[name for name, _ in others] == [HANDOVER_NAME],
        kept=kept,
    )


def _seconds(usec: str) -> float | None:
    """A number of microseconds; None: it is none, or nothing."""
    fits = usec.isascii() and usec.isdigit() and len(usec) <= USEC_DIGITS_MAX
    return int(usec) / 1e6 if fits and int(usec) else None


def _passed(told: Mapping[str, str]) -> list[tuple[str, int]]:
    """What was passed, by its names, in the order of the numbers."""
    text = told.get("LISTEN_FDS", "")
    count = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(LISTEN_FDS_MAX)) else 0
    names = told.get("LISTEN_FDNAMES", "").split(":")
    numbers = range(FIRST_FD, FIRST_FD + count)
    for number in numbers:
        os.set_inheritable(number, False)
    return list(zip(names + ["unknown"] * (count - len(names)), numbers, strict=False))


def _listening_socket(numbers: Sequence[int]) -> socket.socket | None:
    if not numbers:
        return None
    try:
        listening = socket.socket(fileno=numbers[0])
    except OSError as error:
        raise _refusal("it passed something else than a socket", None) from error
    count = len(numbers)
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
