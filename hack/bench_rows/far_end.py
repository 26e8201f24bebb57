#!/usr/bin/env python3
"""One end of what hack/bench measures of networks; its rows `forward`, `proxy` and `chroma` start it on both sides.

Who runs it: hack/bench, which has it enter the network of a sandbox with nsenter. When: in those rows.

    far_end.py serve PORT FD...       serve the listening sockets, and one of its own, whose port it prints: on PORT
                                      of all addresses of a container, or for 0 on a free one of the loopback
    far_end.py ask PORT URL [PROXY]   fetch the URL, by a connection of its own each time, as often and in
                                      as many threads as a line of stdin says, and print the seconds
    far_end.py get PORT               the same, with a `get` of the stock client of ChromaDB

The server sends as many zeros as a line asks for. To `GET` it answers as HTTP does.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable

CHUNK = bytes(256 * 1024)
PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello"


def answer(accepted: socket.socket) -> None:
    with accepted, accepted.makefile("rb") as heard:
        line = heard.readline()
        if line.startswith(b"GET "):
            while heard.readline().strip():
                pass
            accepted.sendall(PAGE)
            return
        left = int(line)
        while left:
            piece = CHUNK[: min(left, len(CHUNK))]
            accepted.sendall(piece)
            left -= len(piece)


def accept(listening: socket.socket) -> None:
    while True:
        threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()


def serve(port: int, descriptors: list[int]) -> None:
    own = socket.create_server(("" if port else "127.0.0.1", port))
    for listening in (own, *(socket.socket(fileno=number) for number in descriptors)):
        threading.Thread(target=accept, args=(listening,), daemon=True).start()
    print(own.getsockname()[1], flush=True)
    sys.stdin.read()


def asking(port: int, url: str, proxy: int | None) -> Callable[[], None]:
    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port if proxy is None else proxy)
        connection.request("GET", "/" if proxy is None else url)
        response = connection.getresponse()
        if response.status != 200 or response.read() != b"hello":
            raise SystemExit(f"bench: {url}: {response.status}")
        connection.close()

    return ask


def getting(port: int) -> Callable[[], None]:
    import chromadb
    from chromadb.config import Settings

    client = chromadb.HttpClient(port=port, settings=Settings(anonymized_telemetry=False))
    notes = client.get_or_create_collection("bench", embedding_function=None)
    notes.upsert(ids=["1"], embeddings=[[0.1, 0.2]], documents=["hello"])

    def get() -> None:
        if notes.get(ids=["1"])["documents"] != ["hello"]:
            raise SystemExit("bench: ChromaDB does not answer")

    return get


def measure(operation: Callable[[], None]) -> None:
    """To each line, a count and how many threads: the seconds of each operation, and of all together."""
    print("ready", flush=True)
    for line in sys.stdin:
        count, threads = map(int, line.split())
        seconds: list[float] = []

        def work(times: int, seconds: list[float] = seconds) -> None:
            for _ in range(times):
                started = time.perf_counter()
                operation()
                seconds.append(time.perf_counter() - started)

        began = time.perf_counter()
        workers = [threading.Thread(target=work, args=(count // threads,)) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        print(json.dumps([time.perf_counter() - began, seconds]), flush=True)


def main(verb: str, *words: str) -> None:
    if verb == "serve":
        serve(int(words[0]), [int(word) for word in words[1:]])
    elif verb == "ask":
        measure(asking(int(words[0]), words[1], int(words[2]) if len(words) > 2 else None))
    else:
        measure(getting(int(words[0])))


if __name__ == "__main__":
    main(*sys.argv[1:])
