"""After each round: whether every promise that was made is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from chaos_storm.clients import Client
from chaos_storm.ground import Ground
from chaos_storm.ledger import Book, Held
from sandboxd.client import RpcError

REVIEW_S_MAX = 45.0
LOOK_S = 0.1


class Reviewer:
    """Asks the daemon about all that it promised, when nothing is wrong any more."""

    def __init__(self, ground: Ground, book: Book) -> None:
        self._ground = ground
        self._book = book

    def review(self, client: Client, held: Held) -> None:
        """See that a sandbox and its commands are what its client was promised."""
        if held.shaken:
            # What its state is, nobody knows; that it can be removed is certain.
            client.held.remove(held)
            client.removed.add(held.id)
            self._remove(client, held.id)
            return
        state = self._awaited_state(client, held)
        if state != "running":
            client.held.remove(held)
            if state != "gone" or not held.unclear:
                self._book.happen("sandbox_lost", f"{held} is {state}")
                self._remove(client, held.id)
            return
        _, said = client.command(held, "sh", "-c", "echo $CALLER")
        if said.strip() != held.token.encode():
            self._book.happen("double_owner", f"{held} is {said[:80]!r} and not {held.token}'s")
        rows = {row["command_id"]: row for row in client.call("commands/list", sandbox=held.id)["commands"]}
        for command_id in held.commands:
            if command_id not in rows:
                self._book.happen("command_lost", f"{command_id} of {held}")
        if held.witness is not None and rows.get(held.witness, {"state": "unknown"})["state"] != "running":
            row = rows.get(held.witness, {})
            self._book.happen("command_touched", f"{held.witness} of {held}: {row.get('end')}")
        for command_id in list(held.commands):
            client.collect(held, command_id)
            del held.commands[command_id]
        held.unclear = held.interrupted = False

    def _awaited_state(self, client: Client, held: Held) -> str:
        """Its state, as soon as that is what it must be: a client that lost an answer asks again."""
        deadline_s = time.monotonic() + REVIEW_S_MAX
        while True:
            state = self._state(client, held)
            if state in {"running", "gone"} or time.monotonic() > deadline_s:
                return state
            time.sleep(LOOK_S)

    def _state(self, client: Client, held: Held) -> str:
        try:
            state = str(client.call("sandbox/get", sandbox=held.id)["state"])
            if state == "paused" and (held.unclear or held.interrupted):
                state = str(client.call("sandbox/resume", sandbox=held.id)["state"])
            if state == "stopped" and (held.unclear or held.interrupted):
                held.witness = None
                state = str(client.call("sandbox/start", sandbox=held.id)["state"])
        except RpcError as error:
            return "gone" if error.type == "not_found" else f"unknown: {error}"
        return state

    def _remove(self, client: Client, sandbox_id: str) -> None:
        try:
            client.call("sandbox/kill", sandbox=sandbox_id, wait=True)
        except RpcError as error:
            if error.type != "not_found":
                self._book.happen("sandbox_undead", f"{sandbox_id} cannot be removed: {error}")

    def remove_strangers(self, clients: Sequence[Client]) -> None:
        """Remove what nobody knows that it has: the answers were lost. And see that what was removed is not there."""
        known = {held.id for client in clients for held in client.held}
        removed = set().union(*(client.removed for client in clients))
        deadline_s = time.monotonic() + REVIEW_S_MAX
        while undead := [row["id"] for row in self._rows() if row["id"] in removed]:
            if time.monotonic() > deadline_s:
                for sandbox_id in undead:
                    self._book.happen("sandbox_undead", sandbox_id)
                break
            time.sleep(LOOK_S)
        for row in self._rows():
            if row["id"] not in known:
                self._remove(clients[0], row["id"])
        for client in clients:
            client.removed.clear()

    def remove_everything(self) -> None:
        """All sandboxes, and all slots."""
        for row in self._rows():
            self._ground.daemon.call("sandbox/kill", sandbox=row["id"], wait=True)
        for template in {row["template"] for row in self._ground.daemon.call("pool/list")["pools"]}:
            self._ground.daemon.call("pool/drain", template=template)

    def _rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self._ground.daemon.call("sandbox/list")["sandboxes"]
        return rows
