"""Where the compiled `sandbox-mounter` is."""

from __future__ import annotations

import os

from runtimes.errors import Unsupported


def mounter_binary_path() -> str:
    """The absolute path of the helper.

    Raises:
        Unsupported: it was never built, or cannot be executed.
    """
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox-mounter")
    if not os.access(path, os.X_OK):
        raise Unsupported(f"cannot find {path}", hint="python hack/build_init.py")
    return path
