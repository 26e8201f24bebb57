"""Replies as text for people. Pure: replies in, text out.

Unknown values are a dash: never a zero, never an empty column.
"""

from __future__ import annotations

import stat
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

UNKNOWN = "-"
GAP = "   "
CUT = "..."
IMAGE_ID_CHARACTERS = 12

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
_AGES = ((86_400, "d"), (3_600, "h"), (60, "m"), (1, "s"))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "".join(
        GAP.join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n"
        for line in lines
    )


def size(count: int | None) -> str:
    """Bytes, in the largest unit that fits."""
    if count is None:
        return UNKNOWN
    for unit, name in _SIZES:
        if count >= unit:
            value = count / unit
            return f"{value:.0f} {name}" if value >= 100 else f"{value:.1f}".removesuffix(".0") + f" {name}"
    return f"{count} B"


def age(since_ms: int | None, now_ms: int) -> str:
    """How long ago, in the largest unit that fits."""
    if since_ms is None:
        return UNKNOWN
    seconds = max(now_ms - since_ms, 0) // 1000
    for unit, name in _AGES:
        if seconds >= unit:
            return f"{seconds // unit}{name}"
    return "now"


def shown(text: str) -> str:
    """Text from inside a sandbox: quoted where a terminal would make something else of it."""
    return text if text and text.isprintable() else repr(text)


def until(at_ms: int | None, now_ms: int) -> str:
    """How long until then, to the nearest second, in the largest unit that fits."""
    return UNKNOWN if at_ms is None else age(now_ms, max(at_ms, now_ms) + 500)


def duration(milliseconds: int | None) -> str:
    """A duration as it is written on the command line."""
    if milliseconds is None:
        return "none"
    for unit_s, name in _AGES:
        if milliseconds % (unit_s * 1000) == 0:
            return f"{milliseconds // (unit_s * 1000)}{name}"
    return f"{milliseconds / 1000:g}s"


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


def yes_no(flag: bool) -> str:
    """A flag in words."""
    return "yes" if flag else "no"


def _known(value: object) -> str:
    return UNKNOWN if value is None or value == "" else str(value)


def limit_value(value: int | str | None, unit: str) -> str:
    """One figure of a limit, in the unit that people use."""
    if value is None or isinstance(value, str):
        return _known(value)
    if unit == "bytes":
        return size(value)
    if unit == "millicpu":
        return f"{value / 1000:g}"
    return str(value)


def limits_table(limits: Sequence[dict[str, Any]]) -> str:
    """What was asked, what the engine says, what the kernel enforces."""
    return table(
        ("LIMIT", "REQUESTED", "REPORTED", "EFFECTIVE", "VERIFIED"),
        [
            (
                limit["name"],
                *(limit_value(limit[view], limit["unit"]) for view in ("requested", "reported", "effective")),
                _verdict(limit),
            )
            for limit in limits
        ],
    )


def _verdict(limit: dict[str, Any]) -> str:
    word = yes_no(limit["verified"])
    return f"{word} ({limit['reason']})" if limit["reason"] else word


CELL_LENGTH_MIN = 12
"""Of a cell that is cut: less says nothing."""


def fitted(text: str, columns: int | None) -> str:
    """The text with lines no longer than a terminal's; None: as it is."""
    return text if columns is None else "".join(f"{_cut(line, columns)}\n" for line in text.splitlines())


def _without_empty(text_of: Sequence[Sequence[str]]) -> list[list[str]]:
    """The table without columns of which nothing is known; the header is its first row."""
    told = [any(row[column] != UNKNOWN for row in text_of[1:]) for column in range(len(text_of[0]))]
    return [[cell for cell, keep in zip(row, told, strict=True) if keep] for row in text_of]


def _narrowed(text_of: list[list[str]], columns: int, yielding: Sequence[str]) -> list[list[str]]:
    """The table, its header first, made to fit: cells of some columns keep their end only, or else those columns go.

    Args:
        text_of: Header and rows.
        columns: How wide it may be.
        yielding: Headers of those columns, the first to yield first.
    """
    for name in yielding:
        over = _width(text_of) - columns
        if over > 0 and name in text_of[0]:
            place = text_of[0].index(name)
            room = max(max(len(row[place]) for row in text_of) - over, CELL_LENGTH_MIN)
            text_of = [[*row[:place], _tail(row[place], room), *row[place + 1 :]] for row in text_of]
    for name in yielding:
        if _width(text_of) > columns and name in text_of[0]:
            place = text_of[0].index(name)
            text_of = [[*row[:place], *row[place + 1 :]] for row in text_of]
    return text_of


def _width(text_of: Sequence[Sequence[str]]) -> int:
    widths = [max(len(row[place]) for row in text_of) for place in range(len(text_of[0]))]
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _tail(text: str, length: int) -> str:
    return text if len(text) <= length else f"...{text[3 - length :]}"


def _short(image: str) -> str:
    return image.removeprefix("localhost/").removesuffix(":latest")


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
            _known(row["name"]),
            row["state"],
            row["engine"],
            row["image"] if columns is None else _short(row["image"]),
            _known(row["workspace"]),
            age(row["created_at_ms"], now_ms),
            until(row["expires_at_ms"], now_ms),
            str(row["commands_running"]),
            yes_no(row["verified"]),
            _known(" ".join(problem["kind"] for problem in row.get("problems", ()))),
        )
        for row in sandboxes
    ]
    if columns is None or not rows:
        return table(header, rows)
    shown, *lines = _narrowed(_without_empty([header, *rows]), columns, ("WORKSPACE", "IMAGE", "ENGINE"))
    return fitted(table(shown, lines), columns)


def shell_list(shells: Sequence[dict[str, Any]], now_ms: int) -> str:
    """One line per shell."""
    return table(
        ("SHELL", "PROGRAM", "STATE", "AGE", "DIRECTORY"),
        [
            (row["shell_id"], row["shell"], row["state"], age(row["opened_at_ms"], now_ms), _known(row["cwd"]))
            for row in shells
        ],
    )


def sandbox(info: dict[str, Any], now_ms: int) -> str:
    """Everything about one sandbox."""
    workspace = info["workspace"]
    facts = [
        ("id", info["id"]),
        ("name", _known(info["name"])),
        ("state", " ".join(text for text in (info["state"], info["state_reason"]) if text)),
        ("engine", info["engine"]),
        ("image", info["image"]),
        ("container", _known(info["container_id"])),
        ("pid", _known(info["pid"])),
        ("user", info["user"]),
        ("workspace", f"{workspace['path']} ({_words_of(workspace)})" if workspace else UNKNOWN),
        *(("mount", f"{one['path']} at {one['target']} ({one['mode']}, {one['mounted']})") for one in info["mounts"]),
        ("network", info["network"]),
        ("services", _known(" ".join(info["services"]))),
        ("secrets", _known(" ".join(info["secrets"]))),
        ("env", _known(" ".join(sorted(info["env"])))),
        ("metadata", _known(" ".join(f"{name}={value}" for name, value in sorted(info["metadata"].items())))),
        ("age", age(info["created_at_ms"], now_ms)),
        ("lifetime", lifetime(info, now_ms)),
        ("ephemeral", yes_no(info["ephemeral"])),
        ("commands", str(info["commands_running"])),
    ]
    facts += [("problem", f"{problem['kind']}: {problem['detail']}") for problem in info.get("problems", ())]
    width = max(len(name) for name, _ in facts)
    text = "".join(f"{name.ljust(width)}{GAP}{value}\n" for name, value in facts)
    return f"{text}\n{limits_table(info['limits'])}"


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


def one_line(text: str) -> str:
    """A name that a sandbox chose, without what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def harmless(text: str) -> str:
    """Text that a sandbox wrote, line by line and with its tabs, without what moves a terminal's cursor."""
    return "\n".join("\t".join(one_line(cell) for cell in line.split("\t")) for line in text.split("\n"))


def command_list(commands: Sequence[dict[str, Any]], now_ms: int, columns: int | None) -> str:
    """One line per command, cut to a terminal's width where there is one."""
    text = table(
        ("ID", "PID", "STATE", "AGE", "END", "COMMAND"),
        [
            (
                row["command_id"],
                _known(row["pid"]),
                row["state"],
                age(row["started_at_ms"], now_ms),
                _end(row["end"]),
                " ".join(shown(word) for word in row["argv"]),
            )
            for row in commands
        ],
    )
    return fitted(text, columns)


def _cut(line: str, columns: int) -> str:
    return line if len(line) <= columns else f"{line[: max(columns - len(CUT), 0)]}{CUT}"


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
    lines = [
        ["ID", "NAME", "STATE", "CPU", "MEMORY", "PEAK", "PIDS", "THROTTLED", "OOM KILLS", "WAITING"],
        *(
            [
                row["id"],
                _known(row["name"]),
                row["state"],
                _cpu(row["cpu_percent"], row["cpu_millis"]),
                f"{size(row['memory_bytes'])} / {size(row['memory_bytes_max'])}",
                size(row["memory_bytes_peak"]),
                f"{_known(row['pids'])} / {_known(row['pids_max'])}",
                UNKNOWN if row["throttled_us"] is None else f"{row['throttled_us'] / 1e6:.1f}s",
                _known(row["oom_kills"]),
                _waiting(row),
            ]
            for row in sandboxes
        ),
    ]
    if columns is not None and sandboxes:
        lines = _narrowed(_without_empty(lines), columns, ("NAME", "PEAK", "THROTTLED"))
    header, *rows = lines
    return fitted(table(header, rows), columns)


def _cpu(percent: float | None, millis: int | None) -> str:
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


def verification(proof: dict[str, Any]) -> str:
    """The proof, and how it was made."""
    text = limits_table(proof["limits"])
    if proof["provocations"]:
        text += "\n" + table(
            ("PROVOKED", "HELD", "EVIDENCE"),
            [
                (row["limit"], "-" if row["held"] is None else yes_no(row["held"]), row["evidence"])
                for row in proof["provocations"]
            ],
        )
    return text


def doctor(report: dict[str, Any]) -> str:
    """All findings, and below them what mends what is wrong."""
    text = table(
        ("CHECK", "STATUS", "DETAIL"),
        [(check["name"], check["status"], _known(check["detail"])) for check in report["checks"]],
    )
    fixes = [f"  {check['fix']}\n" for check in report["checks"] if check["fix"]]
    return text + "\nto mend it:\n" + "".join(dict.fromkeys(fixes)) if fixes else text


def repaired(reply: dict[str, Any]) -> str:
    """What became of the journal."""
    if not reply["kept_aside"]:
        return "the journal is whole: there is nothing to repair"
    text = f"wrote the journal anew, with {reply['sandboxes']} sandboxes; the damaged one is {reply['kept_aside']}"
    if reply["rebuilt"]:
        text += f"; rebuilt from their containers: {' '.join(reply['rebuilt'])}"
    if reply["unseen_engines"]:
        text += f"; what {' and '.join(reply['unseen_engines'])} may have is taken in when it answers"
    return text


def gc(found: Sequence[dict[str, Any]]) -> str:
    """One line for each thing, and why."""
    return table(
        ("ACTION", "KIND", "NAME", "ENGINE", "WHY"),
        [
            (row["action"].replace("_", " "), row["kind"], row["name"], row["engine"] or "-", row["reason"])
            for row in found
        ],
    )


def config(entries: Sequence[dict[str, Any]]) -> str:
    """All settings in force."""
    return table(
        ("SETTING", "VALUE", "ORIGIN", ""),
        [(entry["key"], entry["value"], entry["origin"], entry["description"]) for entry in entries],
    )


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


def pools(rows: Sequence[dict[str, Any]]) -> str:
    """One line per pool."""
    text = table(
        (
            "TEMPLATE",
            "ENGINE",
            "USER",
            "WARM",
            "FILLING",
            "TARGET",
            "MIN",
            "MAX",
            "HITS",
            "MISSES",
            "READY IN",
            "FOR",
        ),
        [
            (
                row["template"],
                row["engine"],
                row["user"],
                str(row["warm"]),
                str(row["filling"]),
                "drained" if row["drained"] else str(row["target"]),
                str(row["min"]),
                str(row["max"]),
                str(row["hits"]),
                str(sum(row["misses"].values())),
                UNKNOWN if row["ready_ms"] is None else f"{row['ready_ms']:.0f}ms",
                _known(row["workspace"]),
            )
            for row in rows
        ],
    )
    failures = [f"{row['template']}: {row['failure']}\n" for row in rows if row["failure"]]
    return text + "".join(failures)


def templates(rows: Sequence[dict[str, Any]]) -> str:
    """One line per template."""
    return table(
        ("TEMPLATE", "IMAGE", "MEMORY", "CPUS", "PIDS", "NETWORK", "POOL", ""),
        [
            (
                row["name"],
                row["image"],
                row["memory"],
                row["cpus"],
                str(row["pids"]),
                row["network"],
                f"{row['pool_min']}-{row['pool_max']}",
                row["description"],
            )
            for row in rows
        ],
    )


def template(row: dict[str, Any]) -> str:
    """Everything about one template; of its variables only the names."""
    return table(
        ("", ""), [(key, " ".join(value) if isinstance(value, dict) else str(value)) for key, value in row.items()]
    )


def images(rows: Sequence[dict[str, Any]], now_ms: int) -> str:
    """One line per image."""
    return table(
        ("ENGINE", "IMAGE", "ID", "SIZE", "AGE"),
        [
            (
                row["engine"],
                _known(" ".join(row["tags"])),
                row["image_id"].removeprefix("sha256:")[:IMAGE_ID_CHARACTERS],
                size(row["size_bytes"]),
                age(row["created_at_ms"], now_ms),
            )
            for row in rows
        ],
    )


def own_service(found: dict[str, Any]) -> str:
    """The daemon as a service of the user's systemd, or that it is none."""
    running = "not running" if found["pid"] is None else f"running, pid {found['pid']}"
    if not found["installed"]:
        return (
            f"daemon      {running}\n"
            f"socket      {found['socket']}\n"
            "systemd     no units of ours; to have some: sandboxctl service install\n"
        )
    lingers = {None: UNKNOWN, True: "yes", False: "no: it stops at your last logout, and sandboxes with it"}
    return (
        f"daemon      {running}\n"
        f"socket      {found['socket']} ({_known(found['listening'])})\n"
        f"service     {_known(found['state'])}, last result {_known(found['result'])}\n"
        f"status      {_known(found['status'])}\n"
        f"restarts    {UNKNOWN if found['restarts'] is None else found['restarts']}\n"
        f"watchdog    {found['watchdog'] or 'off'}\n"
        f"lingers     {lingers[found['lingers']]}\n"
    )


def daemon(info: dict[str, Any], now_ms: int) -> str:
    """The daemon, and the engines that it drives."""
    text = (
        f"running     pid {info['pid']}, version {info['version']}, for {age(info['started_at_ms'], now_ms)}\n"
        f"socket      {info['socket']}\n"
        f"state       {info['state_dir']}\n"
        f"sandboxes   {info['sandboxes']}\n"
        f"memory      {size(info['rss_bytes'])}\n"
    )
    engines = [
        (
            f"{engine['name']} (default)" if engine["default"] else engine["name"],
            yes_no(engine["usable"]),
            _known(engine["server_version"] or engine["client_version"]),
            UNKNOWN if engine["rootless"] is None else yes_no(engine["rootless"]),
            _known(engine["cgroup_version"]),
            _known(engine["reason"]),
        )
        for engine in info["engines"]
    ]
    header = ("ENGINE", "USABLE", "VERSION", "ROOTLESS", "CGROUP", "REASON")
    return f"{text}\n{table(header, engines)}" if engines else text
