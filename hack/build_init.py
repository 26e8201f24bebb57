"""Builds `sandbox-init`, the static program that is PID 1 in every sandbox, and its small companions.

Run by hatchling for every wheel and editable install (`[tool.hatch.build.hooks.custom]`), by the tests with
`--sanitize`, and by hand: `python hack/build_init.py [--output FILE] [--sanitize]`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand, where only the compiler is needed
    BuildHookInterface = object  # type: ignore[assignment,misc]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runtimes" / "init"
SOURCES = tuple(FOLDER / name for name in ("init.c", "message.c", "files.c"))
BINARY = FOLDER / "sandbox-init"
MOUNTER_FOLDER = ROOT / "runtimes" / "mounter"
PROGRAMS = {
    BINARY: SOURCES,
    FOLDER / "sandbox-provoke": (FOLDER / "provoke.c",),
    FOLDER / "sandbox-shell": (FOLDER / "shell.c",),
    MOUNTER_FOLDER / "sandbox-mounter": (MOUNTER_FOLDER / "mounter.c",),
}

WARNINGS = (
    "-std=c11 -Wall -Wextra -Werror -Wconversion -Wsign-conversion -Wshadow -Wstrict-prototypes "
    "-Wmissing-prototypes -Wformat=2 -Wcast-align -Wpointer-arith -Wundef -Wvla"
).split()
# The compiler's own default of _FORTIFY_SOURCE, where a distribution sets one, must go first.
RELEASE = (
    "-O2 -fPIE -static-pie -s -fstack-protector-strong -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=2 "
    "-Wl,-z,relro -Wl,-z,now -Wl,-z,noexecstack"
).split()
SANITIZE = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all".split()

COMPILERS = ("cc", "gcc", "musl-gcc", "clang")
RELEASE_HINT = "Debian/Ubuntu: apt install gcc libc6-dev; Fedora: dnf install gcc glibc-static; Arch: pacman -S gcc"
SANITIZE_HINT = (
    "Debian/Ubuntu: apt install gcc libc6-dev libgcc-12-dev (or clang libclang-rt-dev); "
    "Fedora: dnf install gcc libasan libubsan; Arch: pacman -S gcc"
)


class InitBuildError(Exception):
    """No compiler could build init; the message holds what each of them said, and what to install."""


def candidates() -> list[list[str]]:
    """The compilers to try, best first, each as the start of an argv."""
    chosen = shlex.split(os.environ.get("CC", ""))
    return [*([chosen] if chosen else []), *([name] for name in COMPILERS)]


def compile_init(output: Path, *, sources: Sequence[Path] = SOURCES, sanitize: bool = False) -> None:
    """Compiles `sources` to `output`, replacing it atomically.

    Raises:
        InitBuildError: no compiler succeeded.
    """
    flags = WARNINGS + (SANITIZE if sanitize else RELEASE)
    said = []
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-init-") as scratch:
        product = Path(scratch) / "sandbox-init"
        for compiler in candidates():
            argv = [*compiler, *flags, "-o", str(product), *map(str, sources)]
            try:
                done = subprocess.run(argv, capture_output=True, text=True, check=False)
            except OSError as error:
                said.append(f"{shlex.join(compiler)}: {error.strerror}")
                continue
            if done.returncode == 0:
                product.chmod(0o755)
                product.replace(output)
                return
            said.append(f"{shlex.join(argv)}\n{done.stderr.strip()}")
    hint = SANITIZE_HINT if sanitize else RELEASE_HINT
    raise InitBuildError("\n".join([f"cannot compile {sources[0].relative_to(ROOT)}", *said, f"hint: {hint}"]))


def is_current(output: Path, sources: Sequence[Path] = SOURCES) -> bool:
    """Whether `output` is newer than everything it is made from."""
    made_from = [Path(__file__), *sources, *FOLDER.glob("*.h")]
    return output.exists() and output.stat().st_mtime > max(file.stat().st_mtime for file in made_from)


def wheel_tag() -> str:
    """Any Python 3, any ABI, this platform: the program is static, so no manylinux floor applies to it."""
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"py3-none-{platform}"


class InitBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc,unused-ignore]
    """Puts the compiled program beside its source, and into the wheel."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        for binary, sources in PROGRAMS.items():
            if not is_current(binary, sources):
                compile_init(binary, sources=sources)
        build_data["pure_python"] = False
        build_data["tag"] = wheel_tag()
        build_data["artifacts"].extend(str(binary.relative_to(ROOT)) for binary in PROGRAMS)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build sandbox-init and its companions.")
    parser.add_argument("--output", type=Path, metavar="FILE", help="build only sandbox-init, to FILE")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan, not static")
    options = parser.parse_args()
    try:
        wanted = PROGRAMS if options.output is None else {options.output: SOURCES}
        for binary, sources in wanted.items():
            compile_init(binary, sources=sources, sanitize=options.sanitize)
    except InitBuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(*wanted, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
