"""Leases: taking jobs, keeping them, and giving them back.

A worker holds a job by its fencing token, until a moment by Postgres' clock. Whoever takes the job
next moves the token on, and from then on nothing that the former holder says counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from schema.jobs import JobError, JobState
from workers.store import stored_json
from workers.store.deliveries import delivery
from workers.store.part import StorePart, pairs
from workers.store.records import Claim, ClaimedJob, JobAddress, Renewal

if TYPE_CHECKING:
    from collections.abc import Iterable
    from uuid import UUID

    from sqlalchemy import RowMapping, TextClause
    from sqlalchemy.ext.asyncio import AsyncConnection

    from workers.store.records import Held

#: Times a process may die with a job in flight before the job is set aside.
MAX_CRASHES = 5

DEADLINE_PASSED = JobError(
    type="DeadlinePassed", message="the deadline passed before the job had an answer"
)
CANCELLED = JobError(type="Cancelled", message="the job was cancelled before it had an answer")
SET_ASIDE = JobError(
    type="WorkerCrashed",
    message="workers died again and again with this job in flight, so it was set aside; "
    "`promptmill jobs retry` runs it once more",
)

# One statement takes what can be taken and ends what must not run any more. It waits for a row
# that is locked, rather than skip it: whoever asks acknowledges the messages of jobs it did not
# get, so one skipped only because somebody touched it at that moment would be left lying. Locks
# last for one statement and are taken in order of id.
#
# A run whose lease ended counts as a crash and not as an attempt: the process died, and the job
# may have had no part in it.
_CLAIM = text(
    """
    WITH candidate AS (
        SELECT id, state = 'running' AS taken_over,
               CASE WHEN cancel_requested THEN 'cancelled'
                    WHEN deadline_at <= now() THEN 'expired'
                    WHEN crashes + CASE state WHEN 'running' THEN 1 ELSE 0 END >= :max_crashes
                         THEN 'failed'
                    ELSE 'running' END AS next
        FROM jobs
        WHERE id = ANY(CAST(:ids AS uuid[]))
          AND (:suspects OR state = 'queued' AND crashes = 0
               OR crashes >= :max_crashes OR cancel_requested OR deadline_at <= now())
          AND (state = 'queued' AND (available_at <= now() OR cancel_requested
                                     OR deadline_at <= now())
               OR state = 'running' AND lease_until < now())
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs
    SET state = next,
        token = token + 1,
        attempts = attempts + CASE WHEN next = 'running' AND NOT taken_over THEN 1 ELSE 0 END,
        crashes = crashes + CASE WHEN taken_over THEN 1 ELSE 0 END,
        lease_owner = CASE WHEN next = 'running' THEN CAST(:owner AS text) END,
        lease_until = CASE WHEN next = 'running'
                           THEN now() + make_interval(secs => :lease_s) END,
        started_at = CASE WHEN next = 'running' THEN now() ELSE started_at END,
        finished_at = CASE WHEN next <> 'running' THEN now() END,
        error = CASE next WHEN 'cancelled' THEN CAST(:cancelled AS jsonb)
                          WHEN 'expired' THEN CAST(:expired AS jsonb)
                          WHEN 'failed' THEN CAST(:set_aside AS jsonb) END
    FROM candidate
    WHERE jobs.id = candidate.id
    RETURNING model, priority, request, attempts, max_attempts, crashes, deadline_at,
              CAST(extract(epoch FROM deadline_at - now()) AS float8) AS left_s,
              cancel_requested, created_at, traceparent, jobs.id, namespace, channel, options,
              state, token, custom_id, batch_id, finished_at, error, result
    """
)

# What a claim would return of those that nothing stands against, should it be the next to come.
_CLAIMABLE = text(
    """
    SELECT model, priority, request, attempts + 1 AS attempts, max_attempts, crashes, deadline_at,
           CAST(extract(epoch FROM deadline_at - now()) AS float8) AS left_s,
           cancel_requested, created_at, traceparent, id, namespace, channel, options,
           token + 1 AS token, custom_id, batch_id
    FROM jobs
    WHERE id = ANY(CAST(:ids AS uuid[]))
      AND state = 'queued' AND crashes = 0 AND NOT cancel_requested AND available_at <= now()
      AND (deadline_at IS NULL OR deadline_at > now())
    """
)

# Those that a claim without suspects has left alone.
_SUSPECTS = text(
    """
    SELECT id FROM jobs
    WHERE id = ANY(CAST(:ids AS uuid[])) AND available_at <= now()
      AND (state = 'queued' AND crashes > 0 OR state = 'running' AND lease_until < now())
    ORDER BY crashes, id
    """
)

# A job has a lease exactly while it runs; a constraint holds that. The statements ask for the lease
# and not for the state: seeing the state, the planner would read the index of all running jobs,
# which by its old statistics is nearly empty.
_RENEW = text(
    """
    WITH mine AS (
        SELECT jobs.id
        FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS held (id, token)
             JOIN jobs ON jobs.id = held.id AND jobs.token = held.token
        WHERE lease_until IS NOT NULL
        ORDER BY jobs.id
        FOR NO KEY UPDATE OF jobs
    )
    UPDATE jobs
    SET lease_until = now() + make_interval(secs => :lease_s)
    FROM mine
    WHERE jobs.id = mine.id
    RETURNING jobs.id, jobs.cancel_requested
    """
)

# Back to the queue and without a message, so that `Recovery` sends one when the job is due.
_GIVE_BACK = text(
    """
    WITH mine AS (
        SELECT jobs.id
        FROM unnest(CAST(:ids AS uuid[]), CAST(:tokens AS bigint[])) AS held (id, token)
             JOIN jobs ON jobs.id = held.id AND jobs.token = held.token
        WHERE lease_until IS NOT NULL
        ORDER BY jobs.id
        FOR NO KEY UPDATE OF jobs
    )
    UPDATE jobs
    SET state = 'queued', lease_owner = NULL, lease_until = NULL, sent_at = NULL,
        available_at = now() + CASE WHEN cancel_requested THEN interval '0'
                                    ELSE make_interval(secs => :delay_s) END,
        attempts = greatest(attempts - :attempts_back, 0),
        crashes = crashes + :crashes_more,
        error = coalesce(CAST(:error AS jsonb), error)
    FROM mine
    WHERE jobs.id = mine.id
    RETURNING jobs.id, namespace, model, priority
    """
)


class Claims(StorePart):
    """Takes jobs and keeps or gives them back."""

    async def claim(
        self,
        ids: Iterable[UUID],
        *,
        owner: str,
        lease_s: float,
        suspects: bool = True,
        max_crashes: int = MAX_CRASHES,
    ) -> Claim:
        """Take what can be taken of some jobs, in one statement.

        Taken are queued jobs that are due, and running ones whose lease has ended. Those that were
        cancelled or are past their deadline end here, as do those with which too many processes
        died. Jobs that others hold, that are not due or that are over are left alone.

        Args:
            ids: The jobs.
            owner: Name of the worker, for people.
            lease_s: Seconds by Postgres' clock until others may take them.
            suspects: Whether to take jobs, too, with which a process died: they are to be run with
                nothing beside them.
            max_crashes: Deaths of a process after which a job is set aside.

        Returns:
            The jobs to be run, and the outcomes to be published.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "ids": list(ids),
            "owner": owner,
            "lease_s": lease_s,
            "suspects": suspects,
            "max_crashes": max_crashes,
            "cancelled": CANCELLED.model_dump_json(),
            "expired": DEADLINE_PASSED.model_dump_json(),
            "set_aside": SET_ASIDE.model_dump_json(),
        }
        async with self._database.connection() as connection:
            rows = (await connection.execute(_CLAIM, values)).mappings().all()
        return Claim(
            jobs=tuple(_claimed(row) for row in rows if row["state"] == JobState.RUNNING),
            ended=tuple(delivery(row) for row in rows if row["state"] != JobState.RUNNING),
        )

    async def claimable(self, ids: Iterable[UUID]) -> list[ClaimedJob]:
        """Read jobs as a claim would return them, and take none.

        For those whose outcome is known: `Outcomes.finish` ends them without a claim, if they may
        still be claimed by then.

        Args:
            ids: The jobs.

        Returns:
            Those that are queued and due, and that no process died with; with the token that
            whoever takes them next will have.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            rows = (await connection.execute(_CLAIMABLE, {"ids": list(ids)})).mappings().all()
        return [_claimed(row) for row in rows]

    async def suspects_among(self, ids: Iterable[UUID]) -> list[UUID]:
        """Return the jobs that a claim without suspects left alone because they are suspects.

        Args:
            ids: The jobs.

        Returns:
            Those that may be claimed and were in flight when a process died; the least suspect
            first.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            return list((await connection.scalars(_SUSPECTS, {"ids": list(ids)})).all())

    async def renew(self, held: Held, *, lease_s: float) -> Renewal:
        """Keep jobs that are held (heartbeat).

        Args:
            held: Fencing token by job.
            lease_s: Seconds by Postgres' clock from now.

        Returns:
            Which are lost, and which are to be stopped.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            rows = (await connection.execute(_RENEW, {**pairs(held), "lease_s": lease_s})).all()
        return Renewal(
            lost=frozenset(held) - {row.id for row in rows},
            cancelled=frozenset(row.id for row in rows if row.cancel_requested),
        )

    async def release(self, held: Held) -> list[JobAddress]:
        """Give jobs back that were not run to an end; they lose no attempt.

        Args:
            held: Fencing token by job.

        Returns:
            Those that are queued again, without a message.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._give_back(held, attempts_back=1)

    async def suspect(self, held: Held) -> list[JobAddress]:
        """Give jobs back that were in flight when the engine died.

        They lose no attempt, and one more crash is counted.

        Args:
            held: Fencing token by job.

        Returns:
            Those that are queued again, without a message.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        return await self._give_back(held, attempts_back=1, crashes_more=1)

    async def retry_later(
        self, job_id: UUID, token: int, *, delay_s: float, error: JobError | None = None
    ) -> bool:
        """Give back a job whose attempt failed, to be tried again after a while.

        Args:
            job_id: The job.
            token: Fencing token of the run that failed.
            delay_s: Seconds until it may be claimed; a cancelled job is due at once, to be ended.
            error: Why the attempt failed; kept with the job.

        Returns:
            Whether it is queued again; False when the run had lost it.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        given = await self._give_back({job_id: token}, delay_s=delay_s, error=error)
        return bool(given)

    async def _give_back(
        self,
        held: Held,
        *,
        delay_s: float = 0.0,
        attempts_back: int = 0,
        crashes_more: int = 0,
        error: JobError | None = None,
    ) -> list[JobAddress]:
        values: dict[str, Any] = {
            **pairs(held),
            "delay_s": delay_s,
            "attempts_back": attempts_back,
            "crashes_more": crashes_more,
            "error": None if error is None else stored_json.dump_model(error),
        }
        async with self._database.connection() as connection:
            return await addresses(_GIVE_BACK, values, connection)


async def addresses(
    statement: TextClause, values: dict[str, Any], connection: AsyncConnection
) -> list[JobAddress]:
    """Run a statement that returns jobs to be sent.

    Args:
        statement: It returns id, namespace, model and priority, and may return whether the job
            is held.
        values: Its parameters.
        connection: To run it on.

    Returns:
        Where their messages belong.
    """
    rows = (await connection.execute(statement, values)).all()
    return [
        JobAddress(
            id=row.id,
            namespace=row.namespace,
            model=row.model,
            priority=row.priority,
            held=getattr(row, "held", False),
        )
        for row in rows
    ]


def _claimed(row: RowMapping) -> ClaimedJob:
    return ClaimedJob(
        id=row["id"],
        namespace=row["namespace"],
        model=row["model"],
        channel=row["channel"],
        priority=row["priority"],
        request=row["request"],
        options=row["options"],
        token=row["token"],
        attempts=row["attempts"],
        max_attempts=row["max_attempts"],
        crashes=row["crashes"],
        deadline_at=row["deadline_at"],
        left_s=row["left_s"],
        batch_id=row["batch_id"],
        custom_id=row["custom_id"],
        cancel_requested=row["cancel_requested"],
        created_at=row["created_at"],
        traceparent=row["traceparent"],
    )
