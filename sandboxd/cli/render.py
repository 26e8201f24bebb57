"""Sandboxes, their commands and files as text for people. Pure: replies in, text out."""

from __future__ import annotations

import stat
import time

from sandboxd.cli.tables import (
    GAP,
    UNKNOWN,
    age,
    duration,
    facts,
    fitted,
    known,
    on_screen,
    one_line,
    short_image,
    shown,
    size,
    table,
    until,
    with_prose,
    yes_no,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


def lifetime(reply: dict[str, Any], now_ms: int) -> str:
    """How long a sandbox lasts, and what happens then."""
    ends = f"{reply['on_timeout']} in {until(reply['expires_at_ms'], now_ms)}" if reply["expires_at_ms"] else ""
    idle = f"{reply['on_timeout']} when idle for {duration(reply['idle_timeout_ms'])}"
    counted = reply["lifetime_ms"] is not None and not ends
    texts = (
        ends,
        f"{reply['on_timeout']} {duration(reply['lifetime_ms'])} after it is resumed" if counted else "",
        idle if reply["idle_timeout_ms"] is not None else "",
    )
    return ", ".join(text for text in texts if text) or "none"


def event(event: dict[str, Any]) -> str:
    """One line per event: its number, when, what, to which sandbox, and what else there is to say."""
    at = time.strftime("%H:%M:%S", time.localtime(event["at_ms"] / 1000))
    more = " ".join(f"{name}={shown(str(value))}" for name, value in event["data"].items() if value not in {None, ""})
    return f"{event['seq']}{GAP}{at}{GAP}{event['kind']}{GAP}{event['name'] or event['sandbox']}{GAP}{more}".rstrip()


def events_lost(lost: dict[str, Any]) -> str:
    """One line for what is not known any more."""
    return f"{lost['first_seq']}-{lost['last_seq']}{GAP}not kept any longer"


def limit_value(value: int | str | None, unit: str) -> str:
    """One figure of a limit, in the unit that people use."""
    if value is None or isinstance(value, str):
        return known(value)
    if unit == "bytes":
        return size(value)
    if unit == "millicpu":
        return f"{value / 1000:g}"
    return str(value)


def limits_table(limits: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """What was asked, what the engine says, what the kernel enforces."""
    return with_prose(
        ("LIMIT", "REQUESTED", "REPORTED", "EFFECTIVE", "VERIFIED"),
        [
            (
                limit["name"],
                *(limit_value(limit[view], limit["unit"]) for view in ("requested", "reported", "effective")),
                _verdict(limit),
            )
            for limit in limits
        ],
        columns,
    )


def _verdict(limit: dict[str, Any]) -> str:
    word = yes_no(limit["verified"])
    return f"{word} ({limit['reason']})" if limit["reason"] else word


def sandbox_list(sandboxes: Sequence[dict[str, Any]], now_ms: int, columns: int | None = None) -> str:
    """One line per sandbox; on a terminal without what nobody has, and no wider than that."""
    header = (
        "ID",
        "NAME",
        "STATE",
        "ENGINE",
        "IMAGE",
        "WORKSPACE",
        "AGE",
        "LEFT",
        "COMMANDS",
        "VERIFIED",
        "PROBLEMS",
    )
    rows = [
        (
            row["id"],
            known(row["name"]),
            row["state"],
            row["engine"],
            row["image"] if columns is None else short_image(row["image"]),
            known(row["workspace"]),
            age(row["created_at_ms"], now_ms),
            until(row["expires_at_ms"], now_ms),
            str(row["commands_running"]),
            yes_no(row["verified"]),
            known(" ".join(problem["kind"] for problem in row.get("problems", ()))),
        )
        for row in sandboxes
    ]
    return on_screen(header, rows, columns, ("WORKSPACE", "IMAGE", "ENGINE"))


def shell_list(shells: Sequence[dict[str, Any]], now_ms: int, columns: int | None = None) -> str:
    """One line per shell."""
    return on_screen(
        ("SHELL", "PROGRAM", "STATE", "AGE", "DIRECTORY"),
        [
            (row["shell_id"], row["shell"], row["state"], age(row["opened_at_ms"], now_ms), known(row["cwd"]))
            for row in shells
        ],
        columns,
        ("DIRECTORY",),
    )


def sandbox(info: dict[str, Any], now_ms: int, columns: int | None = None) -> str:
    """Everything about one sandbox."""
    workspace = info["workspace"]
    pairs = [
        ("id", info["id"]),
        ("name", known(info["name"])),
        ("state", " ".join(text for text in (info["state"], info["state_reason"]) if text)),
        ("engine", info["engine"]),
        ("image", info["image"]),
        ("container", known(info["container_id"])),
        ("pid", known(info["pid"])),
        ("user", info["user"]),
        ("workspace", f"{workspace['path']} ({_words_of(workspace)})" if workspace else UNKNOWN),
        *(("mount", f"{one['path']} at {one['target']} ({one['mode']}, {one['mounted']})") for one in info["mounts"]),
        ("network", _network(info)),
        ("services", known(" ".join(info["services"]))),
        ("secrets", known(" ".join(info["secrets"]))),
        ("env", known(" ".join(sorted(info["env"])))),
        ("metadata", known(" ".join(f"{name}={value}" for name, value in sorted(info["metadata"].items())))),
        ("age", age(info["created_at_ms"], now_ms)),
        ("lifetime", lifetime(info, now_ms)),
        ("ephemeral", yes_no(info["ephemeral"])),
        ("commands", str(info["commands_running"])),
    ]
    pairs += [("problem", f"{problem['kind']}: {problem['detail']}") for problem in info.get("problems", ())]
    return f"{facts(pairs, columns)}\n{limits_table(info['limits'], columns)}"


def _network(info: dict[str, Any]) -> str:
    verified = info.get("network_verified")
    if verified is None:
        return str(info["network"])
    return f"{info['network']} ({'verified' if verified else 'NOT verified: see sandboxctl network'})"


def _words_of(workspace: dict[str, Any]) -> str:
    words = [workspace["mode"], workspace["mounted"], workspace["backend"]]
    return ", ".join(word for word in dict.fromkeys(words) if word != "bind")


def changes(listed: Sequence[dict[str, Any]]) -> str:
    """A line per path that a sandbox changed, and their sum."""
    if not listed:
        return ""
    rows = [(change["kind"], _lines_of(change), change_in_words(change)) for change in listed]
    insertions = sum(change["insertions"] for change in listed)
    deletions = sum(change["deletions"] for change in listed)
    return f"{table(('WHAT', 'LINES', 'PATH'), rows)}{len(listed)} changed, +{insertions} -{deletions}\n"


def _lines_of(change: dict[str, Any]) -> str:
    if change["binary"]:
        return f"{size(change['old_size_bytes'])} > {size(change['new_size_bytes'])}"
    if change["insertions"] or change["deletions"]:
        return f"+{change['insertions']} -{change['deletions']}"
    return UNKNOWN


def change_in_words(change: dict[str, Any]) -> str:
    """The path, and what no patch tells of it."""
    path = one_line(change["path"]) + ("/" if change["type"] == "dir" else "")
    old_path = "" if change["old_path"] is None else f"{one_line(change['old_path'])} > "
    old_mode, new_mode = change["old_mode"], change["new_mode"]
    mode = f" ({old_mode & 0o777:o} > {new_mode & 0o777:o})" if change["kind"] == "mode" else ""
    kind = f" ({change['kind']})" if change["type"] == "dir" and change["kind"] != "mode" else ""
    note = f": {change['note']}" if change["note"] else ""
    return f"{old_path}{path}{mode}{kind}{note}"


def command_list(commands: Sequence[dict[str, Any]], now_ms: int, columns: int | None) -> str:
    """One line per command, cut to a terminal's width where there is one."""
    text = table(
        ("ID", "PID", "STATE", "AGE", "END", "COMMAND"),
        [
            (
                row["command_id"],
                known(row["pid"]),
                row["state"],
                age(row["started_at_ms"], now_ms),
                _end(row["end"]),
                " ".join(shown(word) for word in row["argv"]),
            )
            for row in commands
        ],
    )
    return fitted(text, columns)


def _end(end: dict[str, Any] | None) -> str:
    """How a command ended: its code or signal, and the verdict where that says more."""
    if end is None:
        return UNKNOWN
    how = ""
    if end["exit_code"] is not None:
        how = f"exit {end['exit_code']}"
    elif end["signal"] is not None:
        how = f"signal {end['signal']}"
    if end["status"] in {"ok", "nonzero", "signaled"}:
        return how or UNKNOWN
    return f"{end['status']} ({how})" if how else str(end["status"])


def metrics_table(sandboxes: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """Usage against limits, one line per sandbox; no wider than a terminal."""
    header = ("ID", "NAME", "STATE", "CPU", "MEMORY", "PEAK", "PIDS", "THROTTLED", "OOMS", "WAITING")
    rows = [
        (
            row["id"],
            known(row["name"]),
            row["state"],
            cpu(row["cpu_percent"], row["cpu_millis"]),
            f"{size(row['memory_bytes'])} / {size(row['memory_bytes_max'])}",
            size(row["memory_bytes_peak"]),
            f"{known(row['pids'])} / {known(row['pids_max'])}",
            UNKNOWN if row["throttled_us"] is None else f"{row['throttled_us'] / 1e6:.1f}s",
            known(row["oom_kills"]),
            _waiting(row),
        )
        for row in sandboxes
    ]
    return on_screen(header, rows, columns, ("NAME", "PEAK", "THROTTLED", "STATE"))


def cpu(percent: float | None, millis: int | None) -> str:
    """How much of a CPU is used, and may be."""
    used = UNKNOWN if percent is None else f"{percent:.1f}%"
    return f"{used} / {UNKNOWN if millis is None else f'{millis / 10:g}%'}"


def _waiting(row: dict[str, Any]) -> str:
    """The share of time in which something waited for a resource, where it is worth a word."""
    shares = [
        f"{name} {pressure['some_avg10_percent']:.0f}%"
        for name in ("cpu", "memory", "io")
        if (pressure := row[f"{name}_pressure"]) and (pressure["some_avg10_percent"] or 0) >= 1
    ]
    return " ".join(shares) or row["reason"] or UNKNOWN


def verification(proof: dict[str, Any], columns: int | None = None) -> str:
    """The proof, and how it was made."""
    text = limits_table(proof["limits"], columns)
    if proof["provocations"]:
        text += "\n" + with_prose(
            ("PROVOKED", "HELD", "EVIDENCE"),
            [
                (row["limit"], UNKNOWN if row["held"] is None else yes_no(row["held"]), row["evidence"])
                for row in proof["provocations"]
            ],
            columns,
        )
    return text


_TYPE_LETTERS = {"file": "-", "dir": "d", "symlink": "l", "fifo": "p", "socket": "s", "char": "c", "block": "b"}


def files(rows: Sequence[dict[str, Any]], now_ms: int) -> str:
    """One line per file."""
    return table(
        ("MODE", "OWNER", "SIZE", "AGE", "PATH"),
        [
            (
                _TYPE_LETTERS.get(row["type"], "?") + stat.filemode(row["mode"])[1:],
                f"{row['uid']}:{row['gid']}",
                size(row["size_bytes"]) if row["type"] == "file" else UNKNOWN,
                age(row["mtime_ns"] // 1_000_000, now_ms),
                shown(row["path"]) + ("" if row["target"] is None else f" -> {shown(row['target'])}"),
            )
            for row in rows
        ],
    )


def change(row: dict[str, Any]) -> str:
    """One line for one change of a file."""
    if row["kind"] == "overflow":
        return "overflow     changes were lost: look again"
    path = shown(row["path"] or ".")
    return f"{row['kind']:<10}{GAP}" + (path if row["old_path"] is None else f"{shown(row['old_path'])} -> {path}")
