"""What a server's SQLite database holds, by kind, and how much each stage of a measurement added."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KINDS = {
    "events": ("events", "event_resources"),
    "artifacts": ("artifact", "artifact_collection"),
    "logs": ("log",),
    "runs": ("flow_run", "flow_run_state", "task_run", "task_run_state", "flow_run_input"),
}
"""Tables by kind, with their indices; an artifact is in both of its tables."""
SETTLE_S, SETTLE_MAX_S = 2.0, 60.0
"""The server writes events and task runs some time after it took them."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a database."""

    total: int
    """The file with its write-ahead log, as a reader sees them."""
    free: int
    """Of it pages that hold nothing and are used again."""
    kinds: dict[str, int]
    """By kind, and `other`."""


def sizes(database: Path) -> Sizes:
    """Read the sizes of a SQLite database that may be in use."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as base:
        (page,) = base.execute("PRAGMA page_size").fetchone()
        (pages,) = base.execute("PRAGMA page_count").fetchone()
        (free,) = base.execute("PRAGMA freelist_count").fetchone()
        query = "SELECT m.tbl_name, SUM(s.pgsize) FROM dbstat s JOIN sqlite_master m ON m.name = s.name GROUP BY 1"
        tables = dict(base.execute(query).fetchall())
    kinds = {kind: sum(tables.pop(name, 0) for name in names) for kind, names in KINDS.items()}
    return Sizes(pages * page, free * page, {**kinds, "other": sum(tables.values())})


def settled(database: Path) -> Sizes:
    """Return the sizes once the server has written what it took, at most a minute later."""
    deadline, last = time.monotonic() + SETTLE_MAX_S, sizes(database)
    while time.monotonic() < deadline:
        time.sleep(SETTLE_S)
        if (now := sizes(database)) == last:
            break
        last = now
    return last


def age(database: Path, days: int) -> None:
    """Let all flow runs have ended so many days earlier, for what goes by its age."""
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as base, base:
        base.execute("UPDATE flow_run SET end_time = strftime('%Y-%m-%d %H:%M:%f000', end_time, ?)", (f"-{days} days",))


def vacuum(database: Path) -> None:
    """Give the free pages of a database back that no server uses."""
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as base:
        base.execute("VACUUM")


@dataclass
class Growth:
    """Sizes of a database after each stage, in order."""

    database: Path
    stages: list[tuple[str, Sizes]] = field(default_factory=list)

    def note(self, stage: str) -> None:
        """Remember the sizes after a stage, once the server has written all of it."""
        self.stages.append((stage, settled(self.database)))

    def table(self) -> str:
        """Return the Markdown table of the stages in megabytes; what each added, by kind."""
        kinds = (*KINDS, "other")
        lines = [f"| after | database | free in it | added | {' | '.join(kinds)} |", "|---" * (len(kinds) + 4) + "|"]
        return "\n".join([*lines, *self._rows(kinds)])

    def _rows(self, kinds: tuple[str, ...]) -> Iterator[str]:
        before = Sizes(0, 0, dict.fromkeys(kinds, 0))
        for stage, now in self.stages:
            used = (now.total - now.free) - (before.total - before.free)
            cells = [now.total, now.free, used, *(now.kinds[kind] - before.kinds[kind] for kind in kinds)]
            yield f"| {stage} | {' | '.join(f'{value / 1e6:.2f}' for value in cells)} |"
            before = now
