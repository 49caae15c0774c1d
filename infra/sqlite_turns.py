"""Writers of our own server's SQLite take turns.

Prefect 3.8.8 begins most transactions as readers (`BEGIN DEFERRED`). When another one commits between the first read
and the first write of such a transaction, SQLite refuses the write at once, whatever its time-out: the server answers
503, and of twenty flow runs that are made together some are refused for minutes. Begun as writers (`BEGIN IMMEDIATE`,
as Prefect does itself where it sets states) they wait for one another. PostgreSQL does not need it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from prefect.server.database.configurations import SQLITE_BEGIN_MODE, AioSqliteConfiguration
from sqlalchemy.ext.asyncio import AsyncSession, AsyncSessionTransaction

_begin = AioSqliteConfiguration.begin_transaction


@asynccontextmanager
async def begin_as_writer(
    self: AioSqliteConfiguration, session: AsyncSession, with_for_update: bool = False
) -> AsyncGenerator[AsyncSessionTransaction]:
    """Begin a transaction as a writer, unless it is inside of another one, for which it would wait for ever.

    The mode is for this transaction's BEGIN alone: sessions that are opened inside, for whatever they read, begin as
    the context says, and would wait for the writer around them, which waits for them.
    """
    writes = with_for_update or SQLITE_BEGIN_MODE.get() is None
    async with _begin(self, session) as transaction:
        if writes:
            token = SQLITE_BEGIN_MODE.set("IMMEDIATE")
            try:
                await session.connection()
            finally:
                SQLITE_BEGIN_MODE.reset(token)
        yield transaction


def take_turns() -> None:
    """Let all transactions of this process on SQLite begin as writers; before its Prefect server starts."""
    AioSqliteConfiguration.begin_transaction = begin_as_writer  # type: ignore[method-assign]
