"""Networks and services as text for people. Pure: replies in, text out."""

from __future__ import annotations

from sandboxd.cli.tables import UNKNOWN, age, ago, facts, on_screen, size, table, with_prose

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

DENIALS_SHOWN_MAX = 20


def network(info: dict[str, Any], now_ms: int, columns: int | None = None) -> str:
    """What a sandbox may reach, and what it did with that."""
    pairs = [
        ("mode", _mode(info)),
        ("allow", "   ".join(info["allow"]) or UNKNOWN),
        ("deny", "   ".join(info["deny"]) or UNKNOWN),
        *(("inject", text) for text in info["inject"]),
        ("proxy", info["proxy"] or UNKNOWN),
        ("requests", f"{info['requests']} ({info['denied']} denied, {info['connections']} connections open)"),
        ("sent", size(info["sent_bytes"])),
        ("received", size(info["received_bytes"])),
    ]
    parts = [facts(pairs, columns)]
    if info["services"]:
        header = ("SERVICE", "SCOPES", "INSIDE", "STATE")
        parts.append(with_prose(header, [_granted(granted) for granted in info["services"]], columns))
    if info["denials"]:
        rows = [_denied(denied, now_ms) for denied in info["denials"][-DENIALS_SHOWN_MAX:]]
        parts.append(with_prose(("DENIED", "WHAT", "COMMAND", "REASON"), rows, columns, ("COMMAND",)))
    return "\n".join(parts) + "".join(f"\nproblem: {problem}\n" for problem in info["problems"])


def _mode(info: dict[str, Any]) -> str:
    if info["interfaces"] is None:
        return f"{info['mode']} (not verified: nobody can look)"
    seen = ", ".join(each["name"] for each in info["interfaces"]) or "no interface"
    return f"{info['mode']} ({'verified' if info['verified'] else 'NOT verified'}: {seen})"


def _granted(granted: dict[str, Any]) -> tuple[str, ...]:
    state = granted["state"] + (f" ({granted['reason']})" if granted["reason"] else "")
    return granted["name"], " ".join(granted["scopes"]) or UNKNOWN, f"127.0.0.1:{granted['port']}", state


def _denied(denied: dict[str, Any], now_ms: int) -> tuple[str, ...]:
    what = f"{denied['method']} {denied['host']}:{denied['port']}"
    return ago(denied["at_ms"], now_ms), what, denied["command"] or UNKNOWN, denied["reason"]


def place(forward: dict[str, Any]) -> str:
    """Where on the host a forward begins."""
    if forward["path"] is not None:
        return str(forward["path"])
    address = f"[{forward['address']}]" if ":" in forward["address"] else forward["address"]
    return f"{address}:{forward['host_port']}"


def ports(info: dict[str, Any], columns: int | None = None) -> str:
    """What is forwarded, and what listens inside."""
    forwards = with_prose(
        ("FORWARD", "HOST", "INSIDE", "CONNECTIONS", "PROBLEM"),
        [
            (
                forward["forward_id"],
                place(forward),
                str(forward["port"]),
                str(forward["connections"]),
                forward["problem"] or UNKNOWN,
            )
            for forward in info["forwards"]
        ],
        columns,
        ("HOST",),
    )
    if info["listening"] is None:
        return forwards
    rows = [
        (listening["address"], str(listening["port"]), listening.get("protocol", "tcp"))
        for listening in info["listening"]
    ]
    return f"{forwards}\n{table(('LISTENS ON', 'PORT', 'PROTOCOL'), rows)}"


def _place_of(row: dict[str, Any]) -> str:
    """Where on the host a service is."""
    if row["address"] and row.get("network") == "own":
        return "own network"
    return str(row["address"] or row["sandbox"] or UNKNOWN)


def services(rows: Sequence[dict[str, Any]], now_ms: int, columns: int | None = None) -> str:
    """One line per service; on a terminal the reasons are below them."""
    text = on_screen(
        ("NAME", "STATE", "SINCE", "PID", "ADDRESS", "INSIDE", "RESTARTS", "SANDBOXES"),
        [
            (
                row["name"],
                row["state"] + (f" ({row['reason']})" if row["reason"] and columns is None else ""),
                age(row["since_ms"], now_ms),
                UNKNOWN if row["pid"] is None else str(row["pid"]),
                _place_of(row),
                f"127.0.0.1:{row['port']}",
                str(row["restarts"]),
                str(len(row["sandboxes"])),
            )
            for row in rows
        ],
        columns,
        ("ADDRESS", "PID"),
    )
    reasons = [(f"{row['name']}:", row["reason"]) for row in rows if row["reason"]]
    return text + (facts(reasons, columns) if reasons and columns is not None else "")
