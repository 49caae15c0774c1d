from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy as sa
from prefect.server.database.configurations import AioSqliteConfiguration

from infra import sqlite_turns
from infra.api import request_json
from infra.server import ServerInfo

COUNT = sa.text("SELECT COUNT(*) FROM t")


async def is_free_during_a_transaction(path: Path) -> tuple[bool, int]:
    """Open a transaction that only read until now; say whether others may write, and what a nested one reads."""
    config = AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{path}")
    engine = await config.engine()
    async with await config.session(engine) as outer, config.begin_transaction(outer):
        await outer.execute(COUNT)
        async with await config.session(engine) as inner, config.begin_transaction(inner):
            read = int((await inner.execute(COUNT)).scalar_one())
        async with await config.session(engine) as reader:  # as models of Prefect do, to look something up
            read += int((await reader.execute(COUNT)).scalar_one())
        free = writes(path)
    await engine.dispose()
    return free, read


def writes(path: Path) -> bool:
    """Say whether a writer gets the database at once."""
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as base:
        try:
            base.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        base.execute("ROLLBACK")
    return True


def test_a_transaction_holds_its_turn_from_its_begin_and_one_inside_does_not_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "turns.db"
    with contextlib.closing(sqlite3.connect(path)) as base, base:
        base.execute("CREATE TABLE t (x)")
    # As Prefect ships it, another writer may come between its read and its write, which is then refused.
    assert asyncio.run(is_free_during_a_transaction(path)) == (True, 0)
    monkeypatch.setattr(AioSqliteConfiguration, "begin_transaction", AioSqliteConfiguration.begin_transaction)
    sqlite_turns.take_turns()
    assert asyncio.run(is_free_during_a_transaction(path)) == (False, 0)
    assert writes(path)


def test_a_queue_is_paused_at_once_on_a_real_server(prefect_server: ServerInfo) -> None:
    """Prefect looks something up in a session of its own while it changes a queue."""
    api = prefect_server.api_url
    request_json(f"{api}/work_pools/", {"name": "turns", "type": "process"})
    queue = request_json(f"{api}/work_pools/turns/queues/default")
    for paused in (True, False):
        request_json(f"{api}/work_queues/{queue['id']}", {"is_paused": paused}, "PATCH", timeout_s=50)  # it took 60
        assert request_json(f"{api}/work_pools/turns/queues/default")["is_paused"] is paused
