"""Being woken when a file changes: all watches of the process on one inotify instance.

A watch is armed for one event. A program that writes a million times between two looks at its file causes one
event and one wake-up, the kernel's queue holds two entries per armed watch at most, and while nobody waits the
writer pays nothing.

inotify does not tell everything: a write through a shared mapping or through io_submit(2) makes no event. Whoever
must not miss those has the file looked at as well, now and then: one timer looks at the files of all who wait, and
wakes those whose file has changed. A timer for each costs a wake-up per file and period: 1.6 % of a CPU with two
hundred files and two seconds, where the one timer takes 0.04 %.

Works directly on the asyncio loop, as `runtimes.init.channel` does. Source: inotify(7), inotify_add_watch(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from typing import Self

from runtimes.errors import Unsupported

IN_MODIFY = 0x2
_IN_Q_OVERFLOW = 0x4000
_IN_ONESHOT = 0x80000000
_EVENT = struct.Struct("=iIII")
"""struct inotify_event: wd, mask, cookie, and how many bytes of a name follow."""
_READ_BYTES = 16 * 1024

Shape = tuple[int, int]
"""What of a file is looked at: its size, and how many blocks it has."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.inotify_add_watch.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)


class WatchRefused(Unsupported):
    """The kernel gives no more watches, or no more inotify instances."""


def shape_of(status: os.stat_result) -> Shape:
    """What must have changed in a file for a look to notice."""
    return status.st_size, status.st_blocks


class Inotify:
    """One inotify instance, of one running event loop.

    Raises:
        WatchRefused: this user has too many instances.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _refused("cannot follow files", "fs.inotify.max_user_instances")
        self._armed: dict[int, set[Watch]] = {}
        self._looked_at: dict[Watch, Shape] = {}
        self._next_look: asyncio.TimerHandle | None = None
        self._loop.add_reader(self._fd, self._on_readable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wake all, and watch no more. Idempotent."""
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        os.close(self._fd)
        self._fd = -1
        self._wake_all()

    def watch(self, fd: int) -> Watch:
        """A watch on the file behind ``fd``, not yet armed. The descriptor must outlive it."""
        return Watch(self, fd)

    @property
    def armed_count(self) -> int:
        """On how many files the kernel is asked to tell of a change."""
        return len(self._armed)

    @property
    def looked_at_count(self) -> int:
        """For how many who wait the timer looks."""
        return len(self._looked_at)

    def arm(self, watch: Watch, fd: int) -> int:
        """Ask for the next event of the file behind ``fd``; used by `Watch.arm`.

        Returns:
            The kernel's number for it. Several watches of one file share one.

        Raises:
            WatchRefused: the kernel gives no more watches.
        """
        number: int = _libc.inotify_add_watch(self._fd, b"/proc/self/fd/%d" % fd, IN_MODIFY | _IN_ONESHOT)
        if number < 0:
            raise _refused("cannot follow a file", "fs.inotify.max_user_watches")
        self._armed.setdefault(number, set()).add(watch)
        return number

    def disarm(self, watch: Watch, number: int) -> None:
        """Take back what ``arm`` asked for; used by `Watch`. Idempotent."""
        watches = self._armed.get(number, set())
        watches.discard(watch)
        if number in self._armed and not watches:
            del self._armed[number]
            # EINVAL when its event is in the queue already; then it is gone, and the event finds nobody.
            _libc.inotify_rm_watch(self._fd, number)

    def look_at(self, watch: Watch, seen: Shape, *, every_s: float) -> None:
        """Wake this watch too when a look finds its file changed; used by `Watch.wait_for_change`.

        The first look is in ``every_s`` at the latest: sooner when one is due for others.
        """
        self._looked_at[watch] = seen
        if self._next_look is None and self._fd >= 0:
            self._next_look = self._loop.call_later(every_s, self._look, every_s)

    def look_away(self, watch: Watch) -> None:
        """Take back what ``look_at`` asked for. Idempotent."""
        self._looked_at.pop(watch, None)

    def _look(self, every_s: float) -> None:
        self._next_look = None
        for watch, seen in self._looked_at.items():
            if watch.shape != seen:
                watch.wake()
        if self._looked_at:
            self._next_look = self._loop.call_later(every_s, self._look, every_s)

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, _READ_BYTES)
            position = 0
            while position < len(data):
                number, mask, _, name_bytes = _EVENT.unpack_from(data, position)
                position += _EVENT.size + name_bytes
                if mask & _IN_Q_OVERFLOW:
                    self._wake_all()
                for watch in self._armed.pop(number, ()):
                    watch.on_event()

    def _wake_all(self) -> None:
        armed, self._armed = self._armed, {}
        for watches in armed.values():
            for watch in watches:
                watch.on_event()


class Watch:
    """Wakes one waiter when one file was written to, truncated or punched, or when somebody says ``wake``.

    In this order, so that nothing is missed: ``arm``, look at the file, and ``wait`` if there was nothing new.
    """

    def __init__(self, inotify: Inotify, fd: int) -> None:
        self._inotify = inotify
        self._fd = fd
        self._number: int | None = None
        self._woken = asyncio.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def arm(self) -> None:
        """Let the next ``wait`` last until something happens after this call.

        Raises:
            WatchRefused: the kernel gives no more watches.
        """
        self._woken.clear()
        if self._number is None:
            self._number = self._inotify.arm(self, self._fd)

    async def wait(self) -> None:
        """Wait until the file has changed since ``arm``, or ``wake`` was called. May be cancelled."""
        await self._woken.wait()

    async def wait_for_change(self, seen: Shape, *, look_s: float) -> None:
        """Wait as ``wait`` does, and no longer than until a look finds another shape than ``seen``.

        Args:
            seen: As of a look after ``arm``, or of one before it that still holds.
            look_s: How often to look.
        """
        self._inotify.look_at(self, seen, every_s=look_s)
        try:
            await self._woken.wait()
        finally:
            self._inotify.look_away(self)

    @property
    def shape(self) -> Shape:
        """The file's, now."""
        return shape_of(os.fstat(self._fd))

    def wake(self) -> None:
        """End the wait."""
        self._woken.set()

    def on_event(self) -> None:
        """Take note that the file changed; called by `Inotify`."""
        self._number = None
        self.wake()

    def close(self) -> None:
        """Watch no more. Idempotent."""
        if self._number is not None:
            self._inotify.disarm(self, self._number)
            self._number = None


def _refused(brief: str, setting: str) -> WatchRefused:
    code = ctypes.get_errno()
    return WatchRefused(brief, detail=f"inotify: {os.strerror(code)}", hint=f"sysctl {setting} shows the limit")
