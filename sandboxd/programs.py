"""The static programs that are mounted into every sandbox."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile

from runtimes.init.binary import init_binary_path, provoke_binary_path, shell_binary_path


def install_programs(state_dir: str) -> str:
    """Copy sandbox-init and its companions to a directory named for their content; return it.

    Sandboxes go on using the programs that they were made with, whatever is upgraded or removed meanwhile.

    Raises:
        InitBinaryMissing: they were never built.
    """
    sources = {
        "sandbox-init": init_binary_path(),
        "sandbox-provoke": provoke_binary_path(),
        "sandbox-shell": shell_binary_path(),
    }
    digest = hashlib.sha256()
    for path in sources.values():
        with open(path, "rb") as file:
            digest.update(file.read())
    directory = os.path.join(state_dir, "bin", digest.hexdigest()[:16])
    if not os.path.isdir(directory):
        os.makedirs(os.path.dirname(directory), mode=0o755, exist_ok=True)
        scratch = tempfile.mkdtemp(dir=os.path.dirname(directory))
        for name, path in sources.items():
            shutil.copyfile(path, os.path.join(scratch, name))
            os.chmod(os.path.join(scratch, name), 0o555)  # noqa: S103  (any uid inside executes them)
        os.chmod(scratch, 0o755)  # noqa: S103  (likewise)
        os.rename(scratch, directory)
    return directory
