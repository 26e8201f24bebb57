"""Becomes a service: with limits of its own, as nobody, and not for longer than the daemon. Run by the supervisor.

``launcher.py PARENT UID DATA_BYTES FILES NETWORK WAY_IN DATA_DIR KEEP -- PROGRAM ARGUMENT...``, by its path, with the
interpreter alone: it imports nothing of the package. KEEP names directories, separated by colons, that the program
must be able to read.

Where NETWORK is ``none`` and the kernel lets this user, the program has a network of its own with nothing but a
loopback. What stays of the launcher then is a process in it that answers each request on the descriptor WAY_IN with a
new socket of that network: see ``way_in``. Which of the two it became is the first thing that is said there.

Where the daemon is root, the program is not: it runs as UID, without capabilities, in a mount namespace of its own in
which DATA_DIR is seen at /mnt, since a daemon's state may be reached by the daemon alone. A directory on the way to
KEEP that this user may not pass, such as /root, is covered by an empty one in which KEEP alone is seen, read-only.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import sys

DATA_INSIDE = "/mnt"
PROCESSES_MAX = 2048
"""And threads, of all services together."""

OWN_NETWORK, HOST_NETWORK = b"o", b"h"
ASK = b"?"

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWNET = 0x00020000, 0x10000000, 0x40000000
SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 1, 64
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND = 1, 2, 4, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> None:
    """One function of the C library that answers -1 when it fails."""
    if getattr(_libc, name)(*arguments) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount, as the system call of that name does."""
    call("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())


def enter_own_network() -> None:
    """Leave the network for one that has a loopback and nothing else; who is not root has a user namespace for that.

    Raises:
        OSError: the kernel does not let this user.
    """
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        call("unshare", CLONE_NEWNET)
    else:
        call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
                file.write(text)
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING))


def forked() -> bool:
    """Whether this is the child. Whoever is not waits for its end, and raises if it failed.

    Raises:
        OSError: the child did not end with 0.
    """
    pid = os.fork()
    if pid and os.waitpid(pid, 0)[1] != 0:
        raise OSError("what was tried in a child failed")
    return pid == 0


def can_have_own_network() -> bool:
    """Whether ``enter_own_network`` will work: a half of it would be worse than nothing."""
    try:
        if not forked():
            return True
    except OSError:
        return False
    try:
        enter_own_network()
    except OSError:
        os._exit(1)
    os._exit(0)


def hand_out_sockets(way_in: int) -> None:
    """Leave a process that does, until nobody asks any more: a child of nobody here, for the program has its own."""
    if not forked():
        return
    if os.fork():
        os._exit(0)
    with socket.socket(fileno=way_in) as asked:
        os.closerange(0, way_in)
        os.closerange(way_in + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        while asked.recv(1):
            with socket.socket() as fresh:
                told = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fresh.fileno()]))]
                asked.sendmsg([OWN_NETWORK], told)
    os._exit(0)


def closed_above(path: str) -> str | None:
    """The topmost directory on the way to ``path`` that others may not pass."""
    parts = os.path.realpath(path).split("/")
    for end in range(2, len(parts) + 1):
        above = "/".join(parts[:end])
        if not os.stat(above).st_mode & 0o001:
            return above
    return None


def open_the_way(keep: list[str]) -> None:
    """Make directories readable for everybody, for this process alone."""
    covered: dict[str, list[tuple[str, int]]] = {}
    for path in dict.fromkeys(os.path.realpath(path) for path in keep):
        above = closed_above(path)
        if above is not None and not any(path.startswith(f"{kept}/") for kept, _ in covered.get(above, [])):
            covered.setdefault(above, []).append((path, os.open(path, os.O_PATH | os.O_DIRECTORY)))
    for above, paths in covered.items():
        mount("none", above, "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755,size=64k")
        for path, descriptor in paths:
            os.makedirs(path, exist_ok=True)
            mount(f"/proc/self/fd/{descriptor}", path, "none", MS_BIND | MS_REC)
            mount("none", path, "none", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)


def become_nobody(uid: int, data_dir: str, keep: list[str]) -> None:
    """Give root up for good."""
    call("unshare", CLONE_NEWNS)
    mount("none", "/", "none", MS_REC | MS_PRIVATE)
    data = os.open(data_dir, os.O_PATH | os.O_DIRECTORY)
    open_the_way(keep)
    mount(f"/proc/self/fd/{data}", DATA_INSIDE, "none", MS_BIND)
    os.close(data)
    # Of this user, who has services and nothing else.
    resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES_MAX, PROCESSES_MAX))
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def main(arguments: list[str]) -> None:
    """Become the program."""
    parent, uid, data_bytes, files, network, way_in, data_dir, keep = arguments[:8]
    program = arguments[9:]
    own_network = network == "none" and can_have_own_network()
    if own_network:
        enter_own_network()
    if int(uid) != os.getuid():
        become_nobody(int(uid), data_dir, keep.split(":"))
        os.chdir(DATA_INSIDE)
    else:
        os.chdir(data_dir)
    os.umask(0o077)
    os.write(int(way_in), OWN_NETWORK if own_network else HOST_NETWORK)
    if own_network:
        hand_out_sockets(int(way_in))
    os.close(int(way_in))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (int(data_bytes), int(data_bytes)))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = int(files) if hard == resource.RLIM_INFINITY else min(int(files), hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.setpriority(os.PRIO_PROCESS, 0, max(os.getpriority(os.PRIO_PROCESS, 0), 5))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # After the change of user, which takes it back.
    call("prctl", PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != int(parent):
        raise SystemExit("the daemon is gone")
    os.execvp(program[0], program)  # noqa: S606  (what it is for)


if __name__ == "__main__":
    main(sys.argv[1:])
