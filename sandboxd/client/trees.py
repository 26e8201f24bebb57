"""Trees of the caller's own host, into archives and out of them.

What comes out of a sandbox is untrusted. It is unpacked by descriptor, one name at a time and never through a link,
so nothing lands outside of the directory that it is unpacked into, whatever the archive says and whoever changes the
tree meanwhile. Nothing but directories, regular files and links is made; nobody gets setuid bits; a file is under its
name whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from sandboxd import tarstream
from sandboxd.tarstream import DIRECTORY, FILE, HARDLINK, SYMLINK, Member, padding_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sandboxd.streams import Incoming, Outgoing, Skips, Tally

LEVELS_MAX = 200
"""Of directories, each an open descriptor while something below it is moved."""

REMEMBERED_BYTES_MAX = 64 * 1024 * 1024
"""Of the names of directories whose modes and times are set in the end."""

_ENTER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_DIRECTORY_RIGHTS = 0o700
_WHAT = {
    stat.S_IFIFO: "it is a FIFO",
    stat.S_IFSOCK: "it is a socket",
    stat.S_IFCHR: "it is a character device",
    stat.S_IFBLK: "it is a block device",
}
_UNNAMED_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


# --- packing


class Packer:
    """A file or a tree of the host on its way into an archive."""

    def __init__(self, outgoing: Outgoing, tally: Tally, skips: Skips) -> None:
        self._outgoing = outgoing
        self._tally = tally
        self._skips = skips
        self._first_names: dict[tuple[int, int], bytes] = {}

    def run(self, path: bytes, name: bytes, *, follow: bool) -> None:
        """Send an archive of what is at ``path``, under the name ``name``.

        Raises:
            OSError: It cannot be read, or nobody reads the archive any more.
        """
        status = os.stat(path, follow_symlinks=follow)
        if stat.S_ISDIR(status.st_mode):
            self._add(name, status, None, b"")
            self._tree(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), name)
        else:
            path = os.path.realpath(path) if follow else path
            parent, own = os.path.split(path)
            directory = os.open(parent or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._add(name, status, directory, own)
            finally:
                os.close(directory)
        self._outgoing.write(tarstream.END)
        self._outgoing.flush()

    def _tree(self, root: int, name: bytes) -> None:
        """Depth first. The descriptors of all levels above are open meanwhile."""
        levels: list[tuple[int, bytes, Iterator[str]]] = []
        try:
            levels.append((root, name, iter(os.listdir(root))))
            while levels:
                directory, above, left = levels[-1]
                entry = next(left, None)
                if entry is None:
                    os.close(levels.pop()[0])
                    continue
                own = os.fsencode(entry)
                below = above + b"/" + own
                with self._skipping(below):
                    status = os.stat(own, dir_fd=directory, follow_symlinks=False)
                    self._add(below, status, directory, own)
                    if stat.S_ISDIR(status.st_mode):
                        if len(levels) >= LEVELS_MAX:
                            raise OSError(errno.ELOOP, f"it has more than {LEVELS_MAX} levels")
                        child = os.open(own, _ENTER, dir_fd=directory)
                        try:
                            names = os.listdir(child)
                        except OSError:
                            os.close(child)
                            raise
                        levels.append((child, below, iter(names)))
        finally:
            for directory, _, _ in levels:
                os.close(directory)

    @contextlib.contextmanager
    def _skipping(self, name: bytes) -> Iterator[None]:
        """What cannot be read is left out; when the archive cannot be written, that is the end."""
        try:
            yield
        except (BrokenPipeError, ConnectionError):
            raise
        except OSError as error:
            self._skips.add(name, _said(error))

    def _add(self, name: bytes, status: os.stat_result, directory: int | None, own: bytes) -> None:
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFREG:
            self._file(name, directory, own)
        elif kind in (stat.S_IFDIR, stat.S_IFLNK):
            target = os.readlink(own, dir_fd=directory) if kind == stat.S_IFLNK else b""
            self._head(name, DIRECTORY if kind == stat.S_IFDIR else SYMLINK, status, target=target)
        else:
            self._skips.add(name, _WHAT.get(kind, "it is of a type that nobody knows"))

    def _file(self, name: bytes, directory: int | None, own: bytes) -> None:
        descriptor = os.open(own, _READ, dir_fd=directory)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                self._skips.add(name, "it was no file any more")
                return
            if status.st_nlink > 1:
                first = self._first_names.setdefault((status.st_dev, status.st_ino), name)
                if first != name:
                    self._head(name, HARDLINK, status, target=first)
                    return
            self._head(name, FILE, status, size=status.st_size)
            sent = self._outgoing.copy_from(descriptor, status.st_size)
            if sent < status.st_size:
                self._skips.add(name, "it was cut short while it was read: the rest of it are zeros")
                self._outgoing.fill(status.st_size - sent)
            self._outgoing.fill(padding_of(status.st_size))
        finally:
            os.close(descriptor)

    def _head(self, name: bytes, kind: str, status: os.stat_result, *, size: int = 0, target: bytes = b"") -> None:
        self._tally.entries += 1
        mode = stat.S_IMODE(status.st_mode)
        member = Member(name, kind, mode=mode, mtime_ns=status.st_mtime_ns, size=size, target=target)
        self._outgoing.write(tarstream.header_of(member))


# --- unpacking


class Unpacker:
    """An archive on its way into a directory of the host.

    Args:
        root: A descriptor of the directory. The caller's.
        exact: Keep modes and times as they are told; else modes lose what the umask takes, and times are new.
        tally: Counts.
        skips: What was left out, and why.
    """

    def __init__(self, root: int, *, exact: bool, tally: Tally, skips: Skips) -> None:
        self._exact = exact
        self._tally = tally
        self._skips = skips
        self._umask = 0 if exact else umask()
        self._levels: list[tuple[bytes, int]] = [(b"", root)]
        self._new: list[tuple[list[bytes], int, int]] = []
        self._remembered_bytes = 0

    def run(self, incoming: Incoming) -> None:
        """Unpack all of it.

        Raises:
            TarError, EndedEarly: It is no archive, or not a whole one. What came before stays.
            OSError: There is no room.
        """
        try:
            while (member := tarstream.next_member(incoming.take)) is not None:
                self._tally.entries += 1
                if not self._take(member, incoming):
                    incoming.discard(member.size)
                incoming.discard(padding_of(member.size))
            incoming.read_trailer()
        finally:
            # Also where it ends early: a directory must not stay open for more than it was meant to be.
            self._finish_directories()
            while len(self._levels) > 1:
                os.close(self._levels.pop()[1])

    def _take(self, member: Member, incoming: Incoming) -> bool:
        """Whether the entry's data were taken from the stream."""
        steps = tarstream.steps_of(member.name)
        if steps is None or len(steps) > LEVELS_MAX:
            self._skips.add(member.name, "its name leads elsewhere, or is too long")
        elif member.kind == tarstream.OTHER:
            self._skips.add(member.name, f"it is {member.what}")
        elif steps:
            begun = False
            try:
                directory = self._enter(steps[:-1])
                if member.kind == FILE:
                    new = NewFile(directory)
                    begun = True
                    self._file(steps[-1], new, member, incoming)
                    return True
                self._make(directory, steps, member)
            except OSError as error:
                if begun or error.errno in _FULL:
                    raise
                self._skips.add(member.name, _said(error))
        elif member.kind != DIRECTORY:
            self._skips.add(member.name, "it has no name")
        return False

    def _enter(self, steps: list[bytes]) -> int:
        """The directory that these names lead to, made where it is missing. Open as long as entries lie below it."""
        same = 0
        while same < len(steps) and same + 1 < len(self._levels) and self._levels[same + 1][0] == steps[same]:
            same += 1
        while len(self._levels) > same + 1:
            os.close(self._levels.pop()[1])
        for step in steps[same:]:
            directory = self._levels[-1][1]
            with contextlib.suppress(FileExistsError):
                os.mkdir(step, 0o777 & ~self._umask | _DIRECTORY_RIGHTS, dir_fd=directory)
            self._levels.append((step, os.open(step, _ENTER, dir_fd=directory)))
        return self._levels[-1][1]

    def _make(self, directory: int, steps: list[bytes], member: Member) -> None:
        name = steps[-1]
        if member.kind == DIRECTORY:
            try:
                os.mkdir(name, member.mode & 0o777 & ~self._umask | _DIRECTORY_RIGHTS, dir_fd=directory)
            except FileExistsError:
                self._enter(steps)
                return
            self._remembered_bytes += sum(map(len, steps)) + 100
            if self._remembered_bytes > REMEMBERED_BYTES_MAX:
                raise OSError(errno.ENOSPC, "the archive has too many directories")
            self._new.append((steps, member.mode & 0o777 & ~self._umask, member.mtime_ns))
        elif member.kind == SYMLINK:
            _replace(directory, name, lambda free: os.symlink(member.target, free, dir_fd=directory))
            if self._exact:
                os.utime(name, ns=(member.mtime_ns, member.mtime_ns), dir_fd=directory, follow_symlinks=False)
        else:
            self._second_name(steps, member)

    def _second_name(self, steps: list[bytes], member: Member) -> None:
        source = tarstream.steps_of(member.target)
        if not source or len(source) > LEVELS_MAX:
            self._skips.add(member.name, "it is a second name of something that the archive cannot mean")
            return
        above = os.dup(self._enter(source[:-1]))
        try:
            directory = self._enter(steps[:-1])
            _replace(
                directory,
                steps[-1],
                lambda free: os.link(source[-1], free, src_dir_fd=above, dst_dir_fd=directory, follow_symlinks=False),
            )
        finally:
            os.close(above)

    def _file(self, name: bytes, new: NewFile, member: Member, incoming: Incoming) -> None:
        with contextlib.closing(new):
            incoming.copy_to(new.descriptor, member.size)
            try:
                new.finish(member.mode & 0o777 & ~self._umask, member.mtime_ns if self._exact else None)
                new.place(name)
            except OSError as error:
                if error.errno in _FULL:
                    raise
                self._skips.add(member.name, _said(error))

    def _finish_directories(self) -> None:
        for steps, mode, mtime_ns in reversed(self._new):
            try:
                directory = self._enter(steps)
                os.fchmod(directory, mode)
                if self._exact:
                    os.utime(directory, ns=(mtime_ns, mtime_ns))
            except OSError as error:
                self._skips.add(b"/".join(steps), _said(error))


class NewFile:
    """A file of the host that has no name of its own yet, or a hidden one where the file system knows no other way.

    Args:
        directory: A descriptor of the directory that it is to lie in. The caller's.
    """

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._hidden: bytes | None = None
        try:
            self.descriptor = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        except OSError as error:
            if error.errno not in _UNNAMED_UNSUPPORTED:
                raise
            self._hidden = _hidden_name()
            how = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
            self.descriptor = os.open(self._hidden, how, 0o600, dir_fd=directory)

    def finish(self, mode: int, mtime_ns: int | None) -> None:
        """Set mode and time, when it has its content."""
        os.fchmod(self.descriptor, mode)
        if mtime_ns is not None:
            os.utime(self.descriptor, ns=(mtime_ns, mtime_ns))

    def place(self, name: bytes) -> None:
        """Give it its name, in place of any other file or link that bears it.

        Raises:
            OSError: A directory bears it.
        """
        if self._hidden is not None:
            os.replace(self._hidden, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._hidden = None
            return
        own = f"/proc/self/fd/{self.descriptor}"
        _replace(
            self._directory,
            name,
            lambda free: os.link(own, free, dst_dir_fd=self._directory, follow_symlinks=True),
        )

    def close(self) -> None:
        """Let it vanish, unless it was placed."""
        os.close(self.descriptor)
        if self._hidden is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._hidden, dir_fd=self._directory)


def _replace(directory: int, name: bytes, make: Callable[[bytes], None]) -> None:
    """Have ``make`` make it under its name, or, where that is taken, under another that then takes its place."""
    try:
        make(name)
    except FileExistsError:
        hidden = _hidden_name()
        make(hidden)
        try:
            os.replace(hidden, name, src_dir_fd=directory, dst_dir_fd=directory)
            # Two names of one file stay two when one is to replace the other.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(hidden, dir_fd=directory)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(hidden, dir_fd=directory)
            raise


def _hidden_name() -> bytes:
    return b".sandboxctl-" + os.urandom(8).hex().encode()


def umask() -> int:
    """What new files lose of their modes. Only looked at: to set it would be seen by other threads."""
    with open("/proc/self/status", "rb") as file:
        (value,) = (line.split()[1] for line in file if line.startswith(b"Umask:"))
    return int(value, 8)


def _said(error: OSError) -> str:
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]
