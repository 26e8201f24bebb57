"""A daemon that says on stderr what each kill by a control group came to, of which nothing else is seen from outside.

Run as ``python -m tests.stock.telling`` in the place of sandboxd, which knows nothing of it.
"""

from __future__ import annotations

import sys

from runtimes.cgroup.fs import CgroupHandle
from sandboxd import daemon

_kill = CgroupHandle.kill


def told(pid: int, *, done: bool) -> str:
    """The line for a sandbox with this init."""
    return f"killed the group of {pid} by one write: {'yes' if done else 'no'}\n"


def _kill_and_tell(self: CgroupHandle) -> bool:
    done = _kill(self)
    sys.stderr.write(told(self.pid, done=done))
    sys.stderr.flush()
    return done


if __name__ == "__main__":
    CgroupHandle.kill = _kill_and_tell  # type: ignore[method-assign]
    raise SystemExit(daemon.main())
