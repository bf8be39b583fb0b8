"""What people do to jobs: cancel them, and run them once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from schema.jobs import JobState
from workers.store.claims import CANCELLED, addresses
from workers.store.deliveries import delivery
from workers.store.part import StorePart
from workers.store.records import Cancellation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable
    from uuid import UUID

    from workers.store.records import JobAddress

_CANCEL = text(
    """
    WITH mine AS (
        SELECT id, state = 'queued' AS waits FROM jobs
        WHERE namespace = :namespace AND id = ANY(CAST(:ids AS uuid[]))
          AND state IN ('queued', 'running')
        ORDER BY id
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

# The token stays and moves on with the next claim, so that outcomes of old runs never count. A
# deadline that has passed would end the job at once, so it is dropped.
_RETRY = text(
    """
    WITH mine AS (
        SELECT id FROM jobs
        WHERE namespace = :namespace
          AND (CAST(:ids AS uuid[]) IS NULL OR id = ANY(CAST(:ids AS uuid[])))
          AND (CAST(:batch_id AS uuid) IS NULL OR batch_id = :batch_id)
          AND state = ANY(CAST(:states AS text[]))
        ORDER BY id
        LIMIT :limit
        FOR NO KEY UPDATE
    ), numbered AS (
        SELECT id, row_number() OVER () > :directly AS waits FROM mine
    )
    UPDATE jobs
    SET state = 'queued', attempts = 0, crashes = 0, cancel_requested = false, sent_at = NULL,
        held = waits,
        available_at = now(), started_at = NULL, finished_at = NULL, published_at = NULL,
        provenance = NULL, answer_id = NULL, result = NULL, error = NULL,
        deadline_at = CASE WHEN deadline_at > now() THEN deadline_at END
    FROM numbered
    WHERE jobs.id = numbered.id
    RETURNING jobs.id, namespace, model, priority, held
    """
)

_RETRYABLE = (JobState.FAILED, JobState.EXPIRED, JobState.CANCELLED)


class Steering(StorePart):
    """Cancels jobs and runs them once more."""

    async def cancel(self, namespace: str, ids: Iterable[UUID]) -> Cancellation:
        """Cancel jobs: at once what waits, by request what runs.

        A run that is done before its worker hears of it keeps its outcome.

        Args:
            namespace: Tenant; jobs of others are left alone.
            ids: The jobs.

        Returns:
            What ended, what was asked to stop, and what was left alone.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        wanted = list(ids)
        values = {"namespace": namespace, "ids": wanted, "error": CANCELLED.model_dump_json()}
        async with self._database.connection() as connection:
            rows = (await connection.execute(_CANCEL, values)).mappings().all()
        return Cancellation(
            ended=tuple(delivery(row) for row in rows if row["state"] == JobState.CANCELLED),
            running=frozenset(row["id"] for row in rows if row["state"] == JobState.RUNNING),
            ignored=frozenset(wanted) - {row["id"] for row in rows},
        )

    async def retry(
        self,
        namespace: str,
        *,
        ids: Iterable[UUID] | None = None,
        batch_id: UUID | None = None,
        states: Collection[JobState] = _RETRYABLE,
        limit: int = 10_000,
        directly: int = 100,
    ) -> list[JobAddress]:
        """Queue jobs that are over once more, as if they had never run.

        Args:
            namespace: Tenant; jobs of others are left alone.
            ids: Only these.
            batch_id: Only those of one batch.
            states: Only those that ended so.
            limit: How many at most; call again for more.
            directly: How many are to be sent by the caller. The others wait for their turn.

        Returns:
            Those that are queued now, without a message; of those that are held, the dispatcher
            writes it.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "namespace": namespace,
            "ids": None if ids is None else list(ids),
            "batch_id": batch_id,
            "states": [state.value for state in states if state.terminal],
            "limit": limit,
            "directly": directly,
        }
        async with self._database.connection() as connection:
            return await addresses(_RETRY, values, connection)
