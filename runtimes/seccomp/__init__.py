"""The seccomp profile that every sandbox runs under, in the OCI JSON form that both engines take.

Deny by default, and narrower than the engines' own defaults, which already refuse what needs a capability.
Refused on top of that, each with EPERM:

* ``io_uring_*``, ``bpf``, ``perf_event_open``, ``userfaultfd``, ``keyctl`` and its kin: a large part of what kernel
  exploits start from, and nothing that an ordinary build or test run needs;
* every new namespace: ``unshare``, ``setns``, ``clone`` with a ``CLONE_NEW*`` flag. ``clone3`` answers ENOSYS, for
  its flags lie in memory where a filter cannot see them, and libc then falls back to ``clone``;
* ``mount``, ``pivot_root``, ``chroot``, the whole new mount API, and device nodes;
* every socket family but Unix, IPv4, IPv6 and netlink's routing: no AF_ALG, AF_VSOCK or AF_PACKET;
* ``ioctl(TIOCSTI)`` and ``ioctl(TIOCLINUX)``, which type into a terminal that a sandbox may share with its caller.

``ptrace`` is allowed as it is by the engines: strace and gdb work inside, and a filter holds for a traced process
too. ``personality(ADDR_NO_RANDOMIZE)`` is not, so gdb says that it cannot switch randomization off, and goes on.

Architectures: x86-64 with 32-bit x86, and 64-bit with 32-bit ARM. Elsewhere, s390 above all, where the arguments of
``clone`` come in another order, the profile names no architecture. x32 is left out. A 32-bit x86 program that makes
its sockets by ``socketcall`` (Go's do) gets none, for no filter sees those arguments.

``profile.json`` is the source: change it by hand, and keep it sorted.
"""

from __future__ import annotations

import os
from typing import Final

PROFILE_NAME: Final = "profile.json"


def profile_path() -> str:
    """Absolute path of the profile on this host. No IO; the engine's client reads the file."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), PROFILE_NAME)
