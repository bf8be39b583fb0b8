"""Locks in Postgres that let one process at a time do a thing."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sqlalchemy import text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.store.database import Database

#: Key of the lock that a pass of `Recovery` holds.
RECOVERY = 0x70726F6D70746D02
#: Key of the lock that a pass of `Upkeep` holds.
UPKEEP = 0x70726F6D70746D03
#: Key of the lock that the one `Dispatcher` at work holds for as long as it lives.
DISPATCH = 0x70726F6D70746D04

_TRY = text("SELECT pg_try_advisory_lock(CAST(:key AS bigint))")
_UNLOCK = text("SELECT pg_advisory_unlock(CAST(:key AS bigint))")


@asynccontextmanager
async def leading(database: Database, key: int) -> AsyncIterator[AsyncConnection | None]:
    """Hold a lock while the body runs, if nobody else does, and lend the connection it lives on.

    What is done on that connection is done by the one who holds the lock: losing the connection
    loses both.

    Args:
        database: Where the lock lives; one connection of it is in use meanwhile.
        key: The lock, a number of 63 bits.

    Yields:
        The connection, or None when another holds the lock.

    Raises:
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    async with database.connection() as connection:
        mine = bool(await connection.scalar(_TRY, {"key": key}))
        try:
            yield connection if mine else None
        finally:
            if mine:
                await _set_free(connection, key)


@asynccontextmanager
async def only_one(database: Database, key: int) -> AsyncIterator[bool]:
    """Hold a lock while the body runs, if nobody else does. It goes with its connection.

    Args:
        database: Where the lock lives; one connection of it is in use meanwhile.
        key: The lock, a number of 63 bits.

    Yields:
        Whether the lock was free and is held now.

    Raises:
        DatabaseUnavailableError: Postgres cannot be used now.
    """
    async with leading(database, key) as connection:
        yield connection is not None


async def _set_free(connection: AsyncConnection, key: int) -> None:
    try:
        await connection.scalar(_UNLOCK, {"key": key})
    except BaseException:
        # Cut short, or the connection is gone: without it the lock is free.
        await connection.invalidate()
        raise
