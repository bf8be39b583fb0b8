"""Deleting what a namespace has in Postgres: all of it, or what is older than may be kept.

The tables are found by their column `namespace`, so that one added later is not forgotten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import delete, exists, func, select, text, tuple_

from schema.tables import AnswerRow, Base, BatchRow, JobRow, NlpResultRow, ReuseDecisionRow
from workers.store.part import StorePart

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from uuid import UUID

    from sqlalchemy import ColumnElement, Table

_AT_A_TIME = 5_000

# From one to the next along an index: what it costs goes with the namespaces, not with the rows.
_NAMESPACES = text(
    """
    WITH RECURSIVE name AS (
        SELECT min(namespace) AS name FROM jobs
        UNION ALL
        SELECT (SELECT min(namespace) FROM jobs WHERE namespace > name.name)
        FROM name WHERE name.name IS NOT NULL
    ), answered AS (
        SELECT min(namespace) AS name FROM answers WHERE tombstoned_at IS NULL
        UNION ALL
        SELECT (SELECT min(namespace) FROM answers
                WHERE namespace > answered.name AND tombstoned_at IS NULL)
        FROM answered WHERE answered.name IS NOT NULL
    )
    SELECT name FROM name WHERE name IS NOT NULL
    UNION SELECT name FROM answered WHERE name IS NOT NULL
    """
)

_STOP = text(
    """
    WITH mine AS (
        SELECT id FROM jobs
        WHERE namespace = :namespace AND state = 'running'
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET cancel_requested = true FROM mine WHERE jobs.id = mine.id
    RETURNING jobs.id
    """
)


def tenant_tables() -> list[Table]:
    """Return the tables that hold tenants' data, those that refer to others first."""
    return [table for table in reversed(Base.metadata.sorted_tables) if "namespace" in table.c]


class Erasure(StorePart):
    """Deletes what a namespace has."""

    async def namespaces(self) -> list[str]:
        """Return every namespace that has jobs or answers.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            return list((await connection.scalars(_NAMESPACES)).all())

    async def stop(self, namespace: str) -> list[UUID]:
        """Ask the workers to stop what runs of a namespace.

        Args:
            namespace: Tenant.

        Returns:
            The jobs that run.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            return list((await connection.scalars(_STOP, {"namespace": namespace})).all())

    async def erase(self, namespace: str) -> dict[str, int]:
        """Delete all rows of a namespace, whatever state they are in.

        Args:
            namespace: Tenant.

        Returns:
            Rows deleted, by table.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now; what was deleted stays so.
        """
        return {
            str(table.name): await self._delete(table, table.c.namespace == namespace)
            for table in tenant_tables()
        }

    async def erase_older(self, namespace: str, before: datetime) -> dict[str, int]:
        """Delete what a namespace has had for too long. Jobs that are not over stay.

        Args:
            namespace: Tenant.
            before: Delete what is from before this moment.

        Returns:
            Rows deleted, by table.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now; what was deleted stays so.
        """
        return {
            str(table.name): await self._delete(table, table.c.namespace == namespace, *too_old)
            for table, too_old in _too_old(before)
        }

    async def remains(self, namespace: str) -> dict[str, int]:
        """Count the rows of a namespace.

        Args:
            namespace: Tenant.

        Returns:
            Rows by table, of every table that holds tenants' data.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        left: dict[str, int] = {}
        async with self._database.connection() as connection:
            for table in tenant_tables():
                count = select(func.count()).where(table.c.namespace == namespace)
                left[str(table.name)] = await connection.scalar(count.select_from(table)) or 0
        return left

    async def _delete(self, table: Table, *which: ColumnElement[bool]) -> int:
        # Group by group, so that no statement runs into its time limit.
        key = list(table.primary_key.columns)
        group = select(*key).where(*which).limit(_AT_A_TIME)
        statement = delete(table).where(tuple_(*key).in_(group))
        deleted = 0
        while True:
            async with self._database.connection() as connection:
                gone = (await connection.execute(statement)).rowcount
            deleted += gone
            if gone < _AT_A_TIME:
                return deleted


def _too_old(before: datetime) -> Iterator[tuple[Any, tuple[ColumnElement[bool], ...]]]:
    """Yield the tables, and what of each is over and from before a moment."""
    job, batch, answer, nlp = JobRow, BatchRow, AnswerRow, NlpResultRow
    # Created first, for that is what the index knows; nothing ends before it is made.
    over = (job.created_at < before, job.finished_at < before, job.published_at.is_not(None))
    yield JobRow.__table__, over
    yield (
        BatchRow.__table__,
        (batch.created_at < before, ~exists().where(job.batch_id == batch.id)),
    )
    yield AnswerRow.__table__, (answer.created_at < before,)
    yield (
        NlpResultRow.__table__,
        (nlp.created_at < before, ~exists().where(answer.nlp_result_id == nlp.id)),
    )
    yield ReuseDecisionRow.__table__, (ReuseDecisionRow.created_at < before,)
