"""Planted secrets, and everything in which one of them could turn up: files, databases, objects, wires, processes."""

from __future__ import annotations

import contextlib
import io
import socket
import sqlite3
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from infra import storage

LOOK_EVERY_S = 0.05


class Wire:
    """A relay before a server on loopback that keeps what passes, both ways; a context manager."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._kept: list[bytearray] = []

    def __enter__(self) -> Wire:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def seen(self) -> bytes:
        """Return all bytes so far; what was cut between two packets is whole, for each way keeps its order."""
        return b"".join(self._kept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:
                    client.close()  # it is not up yet: clients try again
                    continue
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(source, sink), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        passed = bytearray()
        self._kept.append(passed)
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                passed += data
                sink.sendall(data)
        for end in (source, sink):
            end.close()


class CommandLines:
    """Collects the command lines of all descendants of this process while it is open."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        own = psutil.Process()
        while not self._over.wait(LOOK_EVERY_S):
            for process in own.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    self.seen.add("\0".join(process.cmdline()))


def readable(name: str, data: bytes) -> bytes:
    """Return what a file says: its bytes, and in plain text what is compressed or split over pages in them."""
    if name.endswith(".parquet"):
        table = pq.read_table(io.BytesIO(data))
        return data + str(table.schema.metadata).encode() + str(table.to_pylist()).encode()
    return data


def files_below(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file; of a SQLite database all statements that would make it again, too."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield str(path), readable(path.name, path.read_bytes())
            if path.suffix == ".db":
                with contextlib.closing(sqlite3.connect(path)) as base:
                    yield f"{path} (dump)", "\n".join(base.iterdump()).encode()


def objects_below(url: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every object below a URL."""
    for name in storage.find(url):
        yield name, readable(name, storage.read_bytes(storage.join(url, name)))


def places_of(secrets: Mapping[str, str], evidence: Mapping[str, bytes]) -> list[str]:
    """Return `<secret> in <place>` for everything that holds a secret."""
    found = ((name, place) for place, data in evidence.items() for name in secrets if secrets[name].encode() in data)
    return [f"{name} in {place}" for name, place in found]
