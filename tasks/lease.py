"""One writing flow per store: a lease taken by conditional create, renewed while it is held, free of locks and renames.

Leases are numbered. The highest number counts; who finds it released, or its holder dead, creates the next number. Only
one creation succeeds, so two flows never take over the same lease. A holder that was thought dead finds a higher number
at its next renewal and stops.

No two clocks are compared: a holder on this host is dead when its process is, one elsewhere when its lease has not been
written for STALE_SECONDS by the clock of the storage, which gives the lease and a probe beside it their times.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from infra import gauges, storage
from models.store_layout import BUILD, StoreError

RENEW_SECONDS = 15.0
STALE_SECONDS = 300.0


class LeaseError(StoreError):
    """Another flow writes the store, or took the lease over."""


class HeldError(LeaseError):
    """Somebody who lives holds the lease."""

    def __init__(self, text: str, owner: str) -> None:
        super().__init__(text)
        self.owner = owner
        """What the holder calls itself."""


class Lease:
    """Context manager: holds the only right to plan rows and publish in a store.

    `token` names this holder in attempt markers; `took_over` says that the last holder did not release its lease.
    """

    def __init__(self, url: str, owner: str) -> None:
        self.url = url
        self.owner = owner
        self.token = uuid.uuid4().hex
        self.took_over = False
        self._number = 0
        self._name = str(url).rstrip("/").rsplit("/", 1)[-1]
        self._stop = threading.Event()
        self._lost = ""
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> Self:
        numbers = _numbers(self.url)
        last = max(numbers, default=0)
        if last:
            self.took_over = self._refuse_if_held(last)
        self._number = last + 1
        target = _lease_url(self.url, self._number)
        if not storage.create_exclusive(target, self._body()) and _read(target).get("token") != self.token:
            raise _held(self.url, _read(target), 0)
        if max(_numbers(self.url)) > self._number:
            storage.delete(target)
            raise LeaseError(f"{self.url}: another flow took the lease at the same moment; start again when it is done")
        for number in numbers:
            storage.delete(_lease_url(self.url, number))
        gauges.renewed(self._name)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        gauges.released(self._name)
        if not self._lost and self._number == max(_numbers(self.url), default=0):
            storage.write_bytes(_lease_url(self.url, self._number), self._body(released=True))

    def check(self) -> None:
        """Raise LeaseError when the lease is no longer ours; called before anything is published."""
        if not self._lost and (newest := max(_numbers(self.url), default=0)) != self._number:
            self._lost = f"{self.url}: lease {newest} replaced ours ({self._number})"
        if self._lost:
            raise LeaseError(f"{self._lost}; stopping without publishing, receipts stay and are used by the next flow")

    def _refuse_if_held(self, number: int) -> bool:
        """Return whether the last holder died holding it; raises LeaseError naming a holder that lives."""
        target = _lease_url(self.url, number)
        held = _read(target)
        if held.get("released"):
            return False
        age = storage.age_seconds(target)
        if is_dead(held, age):
            return True
        raise _held(self.url, held, age)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            try:
                if max(_numbers(self.url), default=0) != self._number:
                    self._lost = f"{self.url}: another flow took the lease over"
                    return
                storage.write_bytes(_lease_url(self.url, self._number), self._body())
                gauges.renewed(self._name)
            except OSError:
                # The store may be away for a moment; `check` decides before anything is published.
                continue

    def _body(self, released: bool = False) -> bytes:
        body = {
            "owner": self.owner,
            "token": self.token,
            "host": host_id(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "released": released,
        }
        return json.dumps(body).encode()


def is_dead(held: dict[str, Any], age_seconds: float) -> bool:
    """Say whether the holder of a lease is dead: its process on this host, else by the age of its last renewal.

    A process of this host that lives holds its lease however long it sleeps: it may go on where it was.
    """
    if held.get("host") == host_id():
        return _started(int(held["pid"])) != held["started"]
    return age_seconds > STALE_SECONDS


def _started(pid: int) -> str:
    """Return the boot and the clock ticks since then at which a process started; empty when it is dead.

    A pid may have been given to another process. The wall clock, which may be set at any time, has no part in it.
    """
    try:
        # After the program's name, which may hold anything: state, 18 other numbers, start (proc_pid_stat(5)).
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Killed and not yet reaped counts as dead.
    return "" if state in "ZX" else f"{boot} {numbers[18]}"


def host_id() -> str:
    """Name this host and process namespace: pids of another container mean nothing here."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.is_symlink() else ''}".strip()


def _held(url: str, held: dict[str, Any], age_seconds: float) -> HeldError:
    owner = str(held.get("owner", "another flow"))
    return HeldError(
        f"{url} is being written by {owner!r} (pid {held.get('pid')} on "
        f"{held.get('host')}, renewed {age_seconds:.0f} s ago); wait for it, cancel it, or start again "
        f"{STALE_SECONDS:.0f} s after it died",
        owner,
    )


def _read(url: str) -> dict[str, Any]:
    try:
        value = storage.read_json(url)
    except FileNotFoundError:
        return {"released": True}
    return value if isinstance(value, dict) else {}


def _numbers(url: str) -> list[int]:
    names = storage.listdir(storage.join(url, BUILD))
    stems = [name.removeprefix("lease-").removesuffix(".json") for name in names if name.startswith("lease-")]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _lease_url(url: str, number: int) -> str:
    return storage.join(url, BUILD, f"lease-{number}.json")
