"""The daemon, its host, pools, templates and images as text for people. Pure: replies in, text out."""

from __future__ import annotations

from sandboxd.cli.tables import (
    UNKNOWN,
    age,
    facts,
    has_room,
    known,
    on_screen,
    short_image,
    size,
    with_prose,
    yes_no,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

IMAGE_ID_CHARACTERS = 12


def doctor(report: dict[str, Any], columns: int | None = None) -> str:
    """All findings, and below them what mends what is wrong."""
    rows = [(check["name"], check["status"], known(check["detail"])) for check in report["checks"]]
    text = with_prose(("CHECK", "STATUS", "DETAIL"), rows, columns)
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


def gc(found: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """One line for each thing, and why."""
    return with_prose(
        ("ACTION", "KIND", "NAME", "ENGINE", "WHY"),
        [
            (row["action"].replace("_", " "), row["kind"], row["name"], known(row["engine"]), row["reason"])
            for row in found
        ],
        columns,
        ("NAME",),
    )


def config(entries: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """All settings in force; on a terminal what they mean only where there is room for that."""
    header = ("SETTING", "VALUE", "ORIGIN", "")
    rows = [(entry["key"], entry["value"], entry["origin"], entry["description"]) for entry in entries]
    return _with_meaning(header, rows, columns, ("ORIGIN", "VALUE"))


def _with_meaning(
    header: Sequence[str], rows: Sequence[Sequence[str]], columns: int | None, yielding: Sequence[str]
) -> str:
    if has_room(header, rows, columns):
        return with_prose(header, rows, columns)
    return on_screen(header[:-1], [row[:-1] for row in rows], columns, yielding)


def pools(rows: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """One line per pool."""
    text = on_screen(
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
                known(row["workspace"]),
            )
            for row in rows
        ],
        columns,
        ("FOR", "USER", "READY IN", "ENGINE"),
    )
    failures = [f"{row['template']}: {row['failure']}\n" for row in rows if row["failure"]]
    return text + "".join(failures)


def templates(rows: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    """One line per template."""
    return _with_meaning(
        ("TEMPLATE", "IMAGE", "MEMORY", "CPUS", "PIDS", "NETWORK", "POOL", ""),
        [
            (
                row["name"],
                row["image"] if columns is None else short_image(row["image"]),
                row["memory"],
                row["cpus"],
                str(row["pids"]),
                row["network"],
                f"{row['pool_min']}-{row['pool_max']}",
                row["description"],
            )
            for row in rows
        ],
        columns,
        ("IMAGE",),
    )


def template(row: dict[str, Any], columns: int | None = None) -> str:
    """Everything about one template; of its variables only the names."""
    return facts([(key, _words(value)) for key, value in row.items()], columns)


def _words(value: object) -> str:
    return known("   ".join(value) if isinstance(value, dict | list) else value)


def images(rows: Sequence[dict[str, Any]], now_ms: int, columns: int | None = None) -> str:
    """One line per image."""
    return on_screen(
        ("ENGINE", "IMAGE", "ID", "SIZE", "AGE"),
        [
            (
                row["engine"],
                known(" ".join(tag if columns is None else short_image(tag) for tag in row["tags"])),
                row["image_id"].removeprefix("sha256:")[:IMAGE_ID_CHARACTERS],
                size(row["size_bytes"]),
                age(row["created_at_ms"], now_ms),
            )
            for row in rows
        ],
        columns,
        ("IMAGE",),
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
        f"socket      {found['socket']} ({known(found['listening'])})\n"
        f"service     {known(found['state'])}, last result {known(found['result'])}\n"
        f"status      {known(found['status'])}\n"
        f"restarts    {UNKNOWN if found['restarts'] is None else found['restarts']}\n"
        f"watchdog    {found['watchdog'] or 'off'}\n"
        f"lingers     {lingers[found['lingers']]}\n"
    )


def daemon(info: dict[str, Any], now_ms: int, columns: int | None = None) -> str:
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
            known(engine["server_version"] or engine["client_version"]),
            UNKNOWN if engine["rootless"] is None else yes_no(engine["rootless"]),
            known(engine["cgroup_version"]),
            known(engine["reason"]),
        )
        for engine in info["engines"]
    ]
    header = ("ENGINE", "USABLE", "VERSION", "ROOTLESS", "CGROUP", "REASON")
    return f"{text}\n{with_prose(header, engines, columns)}" if engines else text
