"""``cp``: files and trees between the host and sandboxes, and from sandbox to sandbox."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys

from sandboxd.cli import verb
from sandboxd.cli.moving import Mover, name_field, path_fields
from sandboxd.cli.session import FAILURE, USAGE, call, connect, say, show_json
from sandboxd.cli.verb import Verb
from sandboxd.client import RpcError
from sandboxd.client.trees import NewFile, umask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from sandboxd.client import Connection

SKIPPED_SHOWN_MAX = 10

_EXAMPLES = """\
SRC and DST are paths of the host, or SANDBOX:PATH; one at least is in a sandbox. PATH begins at /workspace, or at /
where there is none. A directory is copied into DST if that is there, else as DST; SRC/. means what is in it. A local
path with a colon begins with ./ or /. "-" is a tar archive on stdin or stdout.

examples:
  sandboxctl cp data.csv box:                      into its workspace
  sandboxctl cp -a src box:/tmp/src                with modes and times
  sandboxctl cp box:/tmp/out/. results             what is in out, into results
  sandboxctl cp box:/tmp/out other:/tmp            from sandbox to sandbox
  sandboxctl cp box:/tmp/out - | tar tv            as an archive
  git archive HEAD | sandboxctl cp - box:/tmp/src  from an archive

Only files, directories and links are copied: whatever else there is, is skipped and told of, and the exit code is 1.
A file is under its name whole or not at all. What comes from a sandbox never leads out of DST.
"""


class Place:
    """One end: ``sandbox`` is None on the host, and ``path`` is None for a stream."""

    __slots__ = ("path", "sandbox", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sandbox: str | None = None
        self.path: bytes | None = os.fsencode(text)
        if text == "-":
            self.path = None
        elif not text.startswith(("/", ".")) and "/" not in text.partition(":")[0] and ":" in text:
            self.sandbox, _, path = text.partition(":")
            self.path = os.fsencode(path or ".")


def _place(text: str) -> Place:
    place = Place(text)
    if not text or place.sandbox == "":
        raise argparse.ArgumentTypeError(f"{text!r} is neither a path nor of the form SANDBOX:PATH")
    return place


def _add_cp(parser: argparse.ArgumentParser) -> None:
    verb.add_text(parser, _EXAMPLES)
    parser.add_argument("-a", "--archive", action="store_true", help="keep times, and modes whatever the umask")
    parser.add_argument("-L", "--follow-link", action="store_true", help="copy what SRC leads to, if it is a link")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress")
    parser.add_argument("--bytes-max", type=int, metavar="BYTES", help="refuse to copy more; default: 64 GiB")
    parser.add_argument("--entries-max", type=int, metavar="COUNT", help="refuse to copy more; default: a million")
    parser.add_argument("--idle-timeout", metavar="TIME", help="give up when nothing moves for so long; default: 60s")
    verb.add_json(parser)
    for name in ("src", "dst"):
        verb.complete_places(parser.add_argument(name, metavar=name.upper(), type=_place, help=f"{_HELP[name]}"))


_HELP = {"src": "what to copy: PATH, SANDBOX:PATH or -", "dst": "where to: PATH, SANDBOX:PATH or -"}


def _cp(arguments: argparse.Namespace) -> int:
    source: Place = arguments.src
    target: Place = arguments.dst
    reason = _reason_against(source, target, as_json=arguments.json)
    if reason:
        say(reason)
        sys.stderr.write("hint: sandboxctl cp --help\n")
        return USAGE
    with connect() as connection:
        copy = Copy(connection, arguments)
        result = copy.run(source, target)
        skips = copy.mover.local_skips
    result["skipped"] += [
        {"path": os.fsdecode(path).encode(errors="backslashreplace").decode(), "path_bytes": None, "reason": reason}
        for path, reason in skips.listed
    ]
    result["skipped_count"] += skips.count
    if arguments.json:
        show_json(result)
    return _tell_skipped(result)


def _reason_against(source: Place, target: Place, *, as_json: bool) -> str:
    if source.sandbox is None and target.sandbox is None:
        return "cannot copy: neither SRC nor DST is in a sandbox; one of them is written SANDBOX:PATH"
    if source.path is None and os.isatty(0):
        return "cannot read an archive from a terminal"
    if target.path is None and os.isatty(1):
        return "cannot write an archive to a terminal"
    if target.path is None and as_json:
        return "--json does not go with an archive on stdout"
    return ""


def _tell_skipped(result: dict[str, Any]) -> int:
    for entry in result["skipped"][:SKIPPED_SHOWN_MAX]:
        say(f"skipped {entry['path']!r}: {entry['reason']}")
    more = result["skipped_count"] - len(result["skipped"][:SKIPPED_SHOWN_MAX])
    if more > 0:
        say(f"skipped {more} more")
    return FAILURE if result["skipped_count"] else 0


class Copy:
    """One copy: looks at both ends, and moves."""

    def __init__(self, connection: Connection, arguments: argparse.Namespace) -> None:
        self._connection = connection
        self._exact: bool = arguments.archive
        self._follow: bool = arguments.follow_link
        bounds = {
            "bytes_max": arguments.bytes_max,
            "entries_max": arguments.entries_max,
            "idle_timeout": arguments.idle_timeout,
        }
        self.mover = Mover(connection, bounds, quiet=arguments.quiet)

    def run(self, source: Place, target: Place) -> dict[str, Any]:
        """Copy, and return what was moved.

        Raises:
            RpcError: It cannot be done.
        """
        if source.path is None and target.path is not None:
            return self.mover.stream("files/upload", 0, sandbox=target.sandbox, **path_fields(target.path))
        assert source.path is not None
        if target.path is None:
            fields = {**path_fields(source.path), "follow": self._follow}
            return self.mover.stream("files/download", 1, sandbox=source.sandbox, **fields)
        if source.sandbox is None:
            return self._from_host(source, target, source.path)
        return self._from_sandbox(source, target, source.path)

    # --- from the host

    def _from_host(self, source: Place, target: Place, path: bytes) -> dict[str, Any]:
        try:
            status = os.stat(path, follow_symlinks=self._follow or path.endswith((b"/", b"/.")))
        except OSError as error:
            raise _cannot(source, error) from None
        kind = stat.S_IFMT(status.st_mode)
        final = self._resolve(source, target, path, is_directory=kind == stat.S_IFDIR)
        where: dict[str, Any] = {"sandbox": target.sandbox}
        if kind == stat.S_IFDIR:
            where |= {**path_fields(final), "keep_times": self._exact}
            try:
                return self.mover.upload_tree(path, b".", follow=True, **where)
            except OSError as error:
                raise _cannot(source, error) from None
        if kind == stat.S_IFLNK:
            parent, name = os.path.split(final)
            where |= {**path_fields(parent or b"."), "keep_times": self._exact}
            return self.mover.upload_tree(path, name, follow=False, **where)
        if kind not in (stat.S_IFREG, stat.S_IFIFO):
            raise _refusal(source, "it is neither a file nor a directory", "")
        return self._upload_file(source, path, status, {**where, **path_fields(final)})

    def _upload_file(
        self, source: Place, path: bytes, status: os.stat_result, where: dict[str, Any]
    ) -> dict[str, Any]:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            raise _cannot(source, error) from None
        try:
            if stat.S_ISFIFO(status.st_mode):
                return self.mover.stream("files/upload", descriptor, form="file", **where)
            return self.mover.stream(
                "files/upload",
                descriptor,
                status.st_size,
                form="file",
                mode=stat.S_IMODE(status.st_mode) & 0o777,
                mtime_ns=status.st_mtime_ns if self._exact else None,
                **where,
            )
        finally:
            os.close(descriptor)

    # --- from a sandbox

    def _from_sandbox(self, source: Place, target: Place, path: bytes) -> dict[str, Any]:
        info = self._stat(source.sandbox, path, follow=self._follow or path.endswith((b"/", b"/.")))
        if info is None:
            raise _refusal(source, "there is no such file or directory", "")
        is_directory = info["type"] == "dir"
        final = self._resolve(source, target, path, is_directory=is_directory)
        where: dict[str, Any] = {
            "sandbox": source.sandbox,
            **path_fields(path),
            "follow": self._follow or is_directory,
        }
        parent, name = os.path.split(final)
        if is_directory:
            parent, name = final, b"."
        where["name"] = name_field(name)
        if target.sandbox is not None:
            there = {"sandbox": target.sandbox, **path_fields(parent or b"."), "keep_times": self._exact}
            return self.mover.between(where, there)
        if info["type"] == "file":
            del where["name"]
            return self._download_file(target, parent or b".", name, info, where)
        try:
            if is_directory:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(parent)
            directory = os.open(parent or b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise _cannot(target, error) from None
        try:
            return self.mover.download_tree(directory, exact=self._exact, **where)
        finally:
            os.close(directory)

    def _download_file(
        self, target: Place, parent: bytes, name: bytes, info: dict[str, Any], where: dict[str, Any]
    ) -> dict[str, Any]:
        mode = info["mode"] & 0o777 & ~(0 if self._exact else umask())
        try:
            directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                with contextlib.closing(NewFile(directory)) as new:
                    result = self.mover.stream(
                        "files/download", new.descriptor, info["size_bytes"], form="file", **where
                    )
                    new.finish(mode, info["mtime_ns"] if self._exact else None)
                    new.place(name)
                    return result
            finally:
                os.close(directory)
        except OSError as error:
            raise _cannot(target, error) from None

    # --- where to

    def _resolve(self, source: Place, target: Place, path: bytes, *, is_directory: bool) -> bytes:
        """The path that the copy is to have: DST itself, or SRC's name in it."""
        assert target.path is not None
        wanted = target.path
        kind = self._kind(target.sandbox, wanted)
        if kind == "dir":
            whole = path.endswith(b"/.") or path == b"."
            name = os.path.basename(os.path.normpath(path))
            return (
                wanted if (is_directory and whole) or name in (b"", b".", b"..", b"/") else os.path.join(wanted, name)
            )
        if kind is None:
            stripped = wanted.rstrip(b"/")
            if wanted.endswith(b"/") and not is_directory:
                raise _refusal(target, "there is no such directory", _mkdir(target, wanted))
            parent = os.path.dirname(stripped)
            if parent and self._kind(target.sandbox, parent) != "dir":
                raise _refusal(target, "the directory that it is to lie in is not there", _mkdir(target, parent))
            return stripped
        if is_directory:
            raise _refusal(target, f"SRC {source.text!r} is a directory, and this is none", "")
        if kind != "file" or wanted.endswith(b"/"):
            raise _refusal(target, "it is neither a file nor a directory", "")
        # A link at the host's end was chosen by the caller; it stays, and what it leads to is replaced.
        return os.path.realpath(wanted) if target.sandbox is None else wanted

    def _kind(self, sandbox: str | None, path: bytes) -> str | None:
        """What is there: ``dir``, ``file`` or something else; None for nothing. Links are followed."""
        if sandbox is not None:
            info = self._stat(sandbox, path, follow=True)
            return None if info is None else str(info["type"])
        try:
            mode = os.stat(path).st_mode
        except OSError:
            return "link" if os.path.islink(path) else None
        return "dir" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"

    def _stat(self, sandbox: str | None, path: bytes, *, follow: bool) -> dict[str, Any] | None:
        try:
            return call(self._connection, "files/stat", sandbox=sandbox, follow=follow, **path_fields(path))
        except RpcError as error:
            if error.type == "not_found" and error.detail.startswith("ENOENT"):
                return None
            raise


def _mkdir(target: Place, path: bytes) -> str:
    shown = os.fsdecode(path)
    return f"mkdir -p {shown}" if target.sandbox is None else f"sandboxctl exec {target.sandbox} mkdir -p {shown}"


def _cannot(place: Place, error: OSError) -> RpcError:
    return _refusal(place, error.strerror or str(error), "")


def _refusal(place: Place, detail: str, hint: str) -> RpcError:
    return RpcError(0, "conflict", f"cannot copy {place.text!r}", detail, hint)


VERBS = {"cp": Verb("copy files and directories between host and sandboxes", _add_cp, _cp)}
