"""Batches: a file's worth of jobs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from sqlalchemy import text

from workers.store import stored_json
from workers.store.claims import CANCELLED
from workers.store.deliveries import delivery, result
from workers.store.part import StorePart
from workers.store.records import Batch, Cancellation

if TYPE_CHECKING:
    from sqlalchemy import RowMapping

    from schema.jobs import JobResult

_CREATE = text(
    """
    INSERT INTO batches (id, namespace, source, digest, total, details)
    VALUES (:id, :namespace, CAST(:source AS text), CAST(:digest AS bytea),
            CAST(:total AS bigint), CAST(:details AS jsonb))
    RETURNING *
    """
)

_GET = text("SELECT * FROM batches WHERE namespace = :namespace AND id = :id")

_BY_DIGEST = text(
    """
    SELECT * FROM batches
    WHERE namespace = :namespace AND digest = :digest
    ORDER BY created_at DESC
    LIMIT 1
    """
)

_LIST = text(
    """
    SELECT * FROM batches
    WHERE namespace = :namespace
      AND (CAST(:before AS uuid) IS NULL OR (created_at, id) < (
               SELECT created_at, id FROM batches WHERE id = :before AND namespace = :namespace))
    ORDER BY created_at DESC, id DESC
    LIMIT :limit
    """
)

# By the index on (batch_id, row): a page costs the same wherever it stands in the batch.
_RESULTS = text(
    """
    SELECT id, namespace, channel, options, state, token, custom_id, batch_id, finished_at,
           error, result, row
    FROM jobs
    WHERE namespace = :namespace AND batch_id = :batch_id AND row > :after
      AND state NOT IN ('queued', 'running')
    ORDER BY row
    LIMIT :limit
    """
)

_UPDATE = text(
    """
    UPDATE batches
    SET status = coalesce(CAST(:status AS text), status),
        total = coalesce(CAST(:total AS bigint), total),
        details = details || CAST(:details AS jsonb),
        finished_at = CASE WHEN :over THEN coalesce(finished_at, now()) ELSE finished_at END
    WHERE namespace = :namespace AND id = :id
    RETURNING *
    """
)

_CANCEL_SOME = text(
    """
    WITH mine AS (
        SELECT id, state = 'queued' AS waits FROM jobs
        WHERE namespace = :namespace AND batch_id = :batch_id
          AND (state = 'queued' OR state = 'running' AND NOT cancel_requested)
        ORDER BY id
        LIMIT :limit
        FOR NO KEY UPDATE
    )
    UPDATE jobs
    SET cancel_requested = true,
        state = CASE WHEN waits THEN 'cancelled' ELSE state END,
        token = CASE WHEN waits THEN token + 1 ELSE token END,
        finished_at = CASE WHEN waits THEN now() END,
        error = CASE WHEN waits THEN CAST(:error AS jsonb) ELSE error END
    FROM mine
    WHERE jobs.id = mine.id
    RETURNING jobs.id, namespace, channel, options, state, token, custom_id, batch_id,
              finished_at, error, result
    """
)


class Batches(StorePart):
    """Keeps batches."""

    async def create_batch(
        self,
        namespace: str,
        *,
        batch_id: UUID | None = None,
        source: str | None = None,
        digest: bytes | None = None,
        total: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> Batch:
        """Write a batch, before the jobs that name it.

        Args:
            namespace: Tenant.
            batch_id: Its id; a new one unless given.
            source: Name of the input file.
            digest: SHA-256 of the input, to resume by.
            total: Rows, when known.
            details: JSON types of the caller's own.

        Returns:
            The batch.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "id": batch_id or uuid4(),
            "namespace": namespace,
            "source": None if source is None else stored_json.clean(source),
            "digest": digest,
            "total": total,
            "details": stored_json.dump(details or {}),
        }
        async with self._database.connection() as connection:
            return _batch((await connection.execute(_CREATE, values)).mappings().one())

    async def batch(self, namespace: str, batch_id: UUID) -> Batch | None:
        """Return a batch, or None when the namespace has no such.

        Args:
            namespace: Tenant.
            batch_id: The batch.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._first(_GET, {"namespace": namespace, "id": batch_id})

    async def batch_of(self, namespace: str, digest: bytes) -> Batch | None:
        """Return the newest batch of one input, or None.

        Args:
            namespace: Tenant.
            digest: SHA-256 of the input.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._first(_BY_DIGEST, {"namespace": namespace, "digest": digest})

    async def list_batches(
        self, namespace: str, *, limit: int = 100, before: UUID | None = None
    ) -> list[Batch]:
        """Return batches, newest first.

        Args:
            namespace: Tenant.
            limit: How many at most.
            before: The last batch of the page before.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "limit": limit, "before": before}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_LIST, values)).mappings().all()
        return [_batch(row) for row in rows]

    async def batch_results(
        self, namespace: str, batch_id: UUID, *, after: int = -1, limit: int = 500
    ) -> list[tuple[int, JobResult]]:
        """Return outcomes of a batch's jobs in the order of its rows.

        Args:
            namespace: Tenant.
            batch_id: The batch.
            after: The last row of the page before.
            limit: How many at most.

        Returns:
            Pairs of row and result; jobs that are not over are passed over.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "batch_id": batch_id, "after": after, "limit": limit}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_RESULTS, values)).mappings().all()
        return [(row["row"], result(row)) for row in rows]

    async def update_batch(
        self,
        namespace: str,
        batch_id: UUID,
        *,
        status: str | None = None,
        total: int | None = None,
        details: dict[str, Any] | None = None,
        over: bool = False,
    ) -> Batch | None:
        """Change what is known of a batch; what is not given stays.

        Args:
            namespace: Tenant.
            batch_id: The batch.
            status: As in OpenAI's Batch API, such as ``completed``.
            total: Rows.
            details: Entries to set.
            over: Whether it is finished; the moment is noted once.

        Returns:
            The batch, or None when the namespace has no such.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "namespace": namespace,
            "id": batch_id,
            "status": status,
            "total": total,
            "details": stored_json.dump(details or {}),
            "over": over,
        }
        return await self._first(_UPDATE, values)

    async def finish_batch(
        self, namespace: str, batch_id: UUID, *, status: str = "completed"
    ) -> Batch | None:
        """Close a batch.

        Args:
            namespace: Tenant.
            batch_id: The batch.
            status: How it ended.

        Returns:
            The batch, or None when the namespace has no such.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self.update_batch(namespace, batch_id, status=status, over=True)

    async def cancel_batch(
        self, namespace: str, batch_id: UUID, *, limit: int = 5_000
    ) -> Cancellation:
        """Cancel jobs of a batch; call again until nothing comes back.

        Args:
            namespace: Tenant.
            batch_id: The batch; its status becomes ``cancelling``.
            limit: Jobs at a time, so that no lock is held for long.

        Returns:
            What ended and what was asked to stop.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "namespace": namespace,
            "batch_id": batch_id,
            "limit": limit,
            "error": CANCELLED.model_dump_json(),
        }
        await self.update_batch(namespace, batch_id, status="cancelling")
        async with self._database.connection() as connection:
            rows = (await connection.execute(_CANCEL_SOME, values)).mappings().all()
        return Cancellation(
            ended=tuple(delivery(row) for row in rows if row["state"] == "cancelled"),
            running=frozenset(row["id"] for row in rows if row["state"] == "running"),
            ignored=frozenset(),
        )

    async def _first(self, statement: Any, values: dict[str, Any]) -> Batch | None:
        async with self._database.connection() as connection:
            row = (await connection.execute(statement, values)).mappings().first()
        return None if row is None else _batch(row)


def _batch(row: RowMapping) -> Batch:
    values = dict(row)
    return Batch(**{**values, "details": stored_json.load(values["details"])})
