"""Stands in for ChromaDB where a real one is not installed: its paths, and that it finds collections by id alone.

Run as a program: ``fake_chroma.py run --path DIR --host HOST --port PORT``. Keeps what it was told in DIR, so that it
outlives the process; ``DIR/die`` makes it end at once, with 0, as a real one does on a busy port.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PREFIX = "/api/v2"
LOCK = threading.Lock()


class Store:
    def __init__(self, directory: str) -> None:
        self.path = os.path.join(directory, "store.json")
        self.databases = {"default_tenant/default_database": {}}
        self.records: dict[str, dict[str, str]] = {}
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                self.databases, self.records = json.load(file)

    def save(self) -> None:
        with open(f"{self.path}.new", "w", encoding="utf-8") as file:
            json.dump([self.databases, self.records], file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{self.path}.new", self.path)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        print(self.command, self.path, flush=True)

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def serve(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or b"null")
        words = self.path.partition("?")[0].removeprefix(f"{PREFIX}/").split("/")
        with LOCK:
            status, content = self.carry_out(words, body)
            self.store.save()
        self.answer(status, content)

    do_GET = do_POST = do_DELETE = do_PUT = serve  # noqa: N815

    def carry_out(self, words: list[str], body: object) -> tuple[int, object]:
        databases, records = self.store.databases, self.store.records
        match (self.command, *words):
            case ("GET", "heartbeat"):
                return 200, {"nanosecond heartbeat": 1}
            case ("POST", "tenants"):
                return 409, {"error": "ChromaError"}
            case ("GET", "tenants", tenant, "databases"):
                names = [name.partition("/")[2] for name in databases if name.startswith(f"{tenant}/")]
                return 200, [{"id": name, "name": name, "tenant": tenant} for name in names]
            case ("POST", "tenants", tenant, "databases") if isinstance(body, dict):
                databases.setdefault(f"{tenant}/{body['name']}", {})
                return 200, {}
            case ("DELETE", "tenants", tenant, "databases", name):
                return (200, {}) if databases.pop(f"{tenant}/{name}", None) is not None else (404, {})
            case (_, "tenants", tenant, "databases", name, *rest):
                collections = databases.get(f"{tenant}/{name}")
                if collections is None:
                    return 404, {"error": "NotFoundError", "message": "no such database"}
                return self.in_database(collections, records, rest, body)
        return 404, {"error": "NotFoundError", "message": self.path}

    def in_database(
        self, collections: dict[str, str], records: dict[str, dict[str, str]], rest: list[str], body: object
    ) -> tuple[int, object]:
        match (self.command, *rest):
            case ("GET", "collections"):
                return 200, [{"id": identity, "name": name} for name, identity in collections.items()]
            case ("POST", "collections") if isinstance(body, dict):
                identity = collections.setdefault(body["name"], str(uuid.uuid4()))
                records.setdefault(identity, {})
                return 200, {"id": identity, "name": body["name"]}
            case ("GET", "collections", "by-id", identity):
                return (200, {}) if identity in collections.values() else (404, {"error": "NotFoundError"})
            case ("POST", "collections", identity, "add") if isinstance(body, dict) and identity in records:
                records[identity].update(body)
                return 201, {}
            case ("POST", "collections", identity, "get") if identity in records:
                return 200, records[identity]
        return 404, {"error": "NotFoundError", "message": self.path}


def main() -> None:
    flags = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    if os.path.exists(os.path.join(flags["--path"], "die")):
        print("the address is already in use", flush=True)
        return
    Handler.store = Store(flags["--path"])
    print("listening", flush=True)
    ThreadingHTTPServer((flags["--host"], int(flags["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
