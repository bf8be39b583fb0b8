"""Reading jobs: where they stand, what came of them, how many there are."""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import text

from schema.errors import InvalidRequestError
from schema.jobs import JobState, JobStatus
from workers.store.deliveries import job_error, result
from workers.store.part import StorePart

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sqlalchemy import RowMapping

    from schema.jobs import JobResult

_STATUS = text(
    """
    SELECT id, namespace, state, model, priority, attempts, crashes, token, created_at,
           started_at, finished_at, published_at, provenance, batch_id, custom_id, error
    FROM jobs
    WHERE namespace = :namespace AND id = ANY(CAST(:ids AS uuid[]))
    """
)

_RESULTS = text(
    """
    SELECT id, namespace, channel, options, state, token, custom_id, batch_id, finished_at,
           error, result
    FROM jobs
    WHERE namespace = :namespace AND id = ANY(CAST(:ids AS uuid[]))
      AND state NOT IN ('queued', 'running')
    """
)

_REQUEST = text("SELECT request FROM jobs WHERE namespace = :namespace AND id = :id")

_LIST = text(
    """
    SELECT id, namespace, state, model, priority, attempts, crashes, token, created_at,
           started_at, finished_at, published_at, provenance, batch_id, custom_id, error
    FROM jobs
    WHERE namespace = :namespace
      AND (CAST(:state AS text) IS NULL OR state = :state)
      AND (CAST(:batch_id AS uuid) IS NULL OR batch_id = :batch_id)
      AND (CAST(:before AS uuid) IS NULL OR (created_at, id) < (
               SELECT created_at, id FROM jobs WHERE id = :before AND namespace = :namespace))
    ORDER BY created_at DESC, id DESC
    LIMIT :limit
    """
)

_COUNTS = text(
    """
    SELECT state, count(*) AS jobs
    FROM jobs
    WHERE (CAST(:namespace AS text) IS NULL OR namespace = :namespace)
      AND (CAST(:batch_id AS uuid) IS NULL OR batch_id = :batch_id)
    GROUP BY state
    """
)


class Inventory(StorePart):
    """Reads jobs."""

    async def status(self, namespace: str, job_id: UUID) -> JobStatus | None:
        """Return where a job stands.

        Args:
            namespace: Tenant.
            job_id: The job.

        Returns:
            Its status, or None when the namespace has no such job.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return (await self.statuses(namespace, [job_id])).get(job_id)

    async def statuses(self, namespace: str, ids: Iterable[UUID]) -> dict[UUID, JobStatus]:
        """Return where jobs stand.

        Args:
            namespace: Tenant.
            ids: The jobs.

        Returns:
            Status by job, of those that the namespace has.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "ids": list(ids)}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_STATUS, values)).mappings().all()
        return {row["id"]: _status(row) for row in rows}

    async def result(self, namespace: str, job_id: UUID) -> JobResult | None:
        """Return the outcome of a job.

        Args:
            namespace: Tenant.
            job_id: The job.

        Returns:
            Its result, or None when it is not over or the namespace has no such job.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return (await self.results(namespace, [job_id])).get(job_id)

    async def results(self, namespace: str, ids: Iterable[UUID]) -> dict[UUID, JobResult]:
        """Return the outcomes of jobs.

        Args:
            namespace: Tenant.
            ids: The jobs.

        Returns:
            Result by job, of those that are over and that the namespace has.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "ids": list(ids)}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_RESULTS, values)).mappings().all()
        return {row["id"]: result(row) for row in rows}

    async def request(self, namespace: str, job_id: UUID) -> dict[str, object] | None:
        """Return what a job asks, as JSON types.

        Args:
            namespace: Tenant.
            job_id: The job.

        Returns:
            A `PromptRequest` or `OpenAIRequest`, or None when the namespace has no such job.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            found = await connection.execute(_REQUEST, {"namespace": namespace, "id": job_id})
            return found.scalar_one_or_none()

    async def list_jobs(
        self,
        namespace: str,
        *,
        state: JobState | None = None,
        batch_id: UUID | None = None,
        limit: int = 100,
        before: UUID | None = None,
    ) -> list[JobStatus]:
        """Return jobs, newest first.

        Args:
            namespace: Tenant.
            state: Only those that stand so.
            batch_id: Only those of one batch.
            limit: How many at most.
            before: The last job of the page before.

        Returns:
            One page.

        Raises:
            InvalidRequestError: `limit` is below 1.
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        if limit < 1:
            msg = "must be 1 or more"
            raise InvalidRequestError(msg, field="limit", value=limit)
        values = {
            "namespace": namespace,
            "state": None if state is None else state.value,
            "batch_id": batch_id,
            "limit": limit,
            "before": before,
        }
        async with self._database.connection() as connection:
            rows = (await connection.execute(_LIST, values)).mappings().all()
        return [_status(row) for row in rows]

    async def counts(
        self, namespace: str | None = None, *, batch_id: UUID | None = None
    ) -> dict[JobState, int]:
        """Count jobs by state. Without a batch it reads every job there is.

        Args:
            namespace: Tenant; None is all of them, for those who run the service.
            batch_id: Only those of one batch.

        Returns:
            A number for each state, zero included.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": namespace, "batch_id": batch_id}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_COUNTS, values)).all()
        return dict.fromkeys(JobState, 0) | {JobState(row.state): row.jobs for row in rows}


def _status(row: RowMapping) -> JobStatus:
    return JobStatus(
        job_id=row["id"],
        namespace=row["namespace"],
        state=row["state"],
        model=row["model"],
        priority=row["priority"],
        attempts=row["attempts"],
        crashes=row["crashes"],
        token=row["token"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        published_at=row["published_at"],
        provenance=row["provenance"],
        batch_id=row["batch_id"],
        custom_id=row["custom_id"],
        error=job_error(row["error"]),
    )
