"""Rows and messages: finding jobs whose message is missing, lost, or due once more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from workers.store.claims import CANCELLED, DEADLINE_PASSED, MAX_CRASHES, SET_ASIDE, addresses
from workers.store.deliveries import delivery
from workers.store.part import StorePart

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime
    from uuid import UUID

    from workers.store.records import Delivery, JobAddress

_MARK_SENT = text(
    """
    WITH mine AS (
        SELECT id FROM jobs
        WHERE id = ANY(CAST(:ids AS uuid[])) AND state = 'queued'
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET sent_at = now() FROM mine WHERE jobs.id = mine.id
    """
)

# A job that has run before is given no grace: nobody else is about to send it.
_UNSENT = text(
    """
    SELECT id, namespace, model, priority
    FROM jobs
    WHERE state = 'queued' AND sent_at IS NULL AND NOT held AND available_at <= now()
      AND (token > 0 OR available_at <= now() - make_interval(secs => :older_than_s))
    ORDER BY available_at
    LIMIT :limit
    """
)

_SENT_BEFORE = text(
    """
    SELECT id, namespace, model, priority
    FROM jobs
    WHERE state = 'queued' AND sent_at IS NOT NULL AND sent_at < :moment
      AND available_at <= now()
    ORDER BY sent_at
    LIMIT :limit
    """
)

# Taken by SKIP LOCKED: a holder that renews or ends its job at this moment is alive after all.
_REQUEUE = text(
    """
    WITH stale AS (
        SELECT id FROM jobs
        WHERE state = 'running' AND lease_until < now()
          AND NOT cancel_requested AND (deadline_at IS NULL OR deadline_at > now())
          AND crashes + 1 < :max_crashes
        ORDER BY lease_until
        LIMIT :limit
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE jobs
    SET state = 'queued', lease_owner = NULL, lease_until = NULL, sent_at = NULL,
        available_at = now(), attempts = greatest(attempts - 1, 0), crashes = crashes + 1
    FROM stale
    WHERE jobs.id = stale.id
    RETURNING jobs.id, namespace, model, priority
    """
)

_END = text(
    """
    WITH over AS (
        SELECT id, CASE WHEN cancel_requested THEN 'cancelled'
                        WHEN deadline_at <= now() THEN 'expired'
                        ELSE 'failed' END AS next
        FROM jobs
        WHERE id IN (
            (SELECT id FROM jobs WHERE state = 'queued' AND deadline_at <= now() LIMIT :limit)
            UNION ALL
            (SELECT id FROM jobs
             WHERE state = 'running' AND lease_until < now()
               AND (cancel_requested OR deadline_at <= now() OR crashes + 1 >= :max_crashes)
             LIMIT :limit)
        )
          AND (state = 'queued' AND deadline_at <= now()
               OR state = 'running' AND lease_until < now()
                  AND (cancel_requested OR deadline_at <= now() OR crashes + 1 >= :max_crashes))
        ORDER BY id
        FOR NO KEY UPDATE SKIP LOCKED
    )
    UPDATE jobs
    SET state = next, token = token + 1, lease_owner = NULL, lease_until = NULL,
        crashes = crashes + CASE WHEN state = 'running' THEN 1 ELSE 0 END, finished_at = now(),
        error = CASE next WHEN 'cancelled' THEN CAST(:cancelled AS jsonb)
                          WHEN 'expired' THEN CAST(:expired AS jsonb)
                          ELSE CAST(:set_aside AS jsonb) END
    FROM over
    WHERE jobs.id = over.id
    RETURNING jobs.id, namespace, channel, options, state, token, custom_id, batch_id,
              finished_at, error, result
    """
)


class Outbox(StorePart):
    """Keeps account of messages, and finds what recovery has to do."""

    async def mark_sent(self, ids: Iterable[UUID]) -> None:
        """Note that messages for jobs were written.

        Args:
            ids: The jobs; those that run already are left alone.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            await connection.execute(_MARK_SENT, {"ids": list(ids)})

    async def unsent(self, *, limit: int, older_than_s: float) -> list[JobAddress]:
        """Return due jobs that have no message, of all namespaces, longest due first.

        Args:
            limit: How many at most.
            older_than_s: Seconds since a new job was due; whoever wrote it may be about to send
                its message. Jobs that ran before are returned as soon as they are due.

        Returns:
            What has to be sent.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"limit": limit, "older_than_s": older_than_s}
        async with self._database.connection() as connection:
            return await addresses(_UNSENT, values, connection)

    async def sent_before(self, moment: datetime, *, limit: int) -> list[JobAddress]:
        """Return queued jobs whose message was written before a moment, oldest first.

        Args:
            moment: By Postgres' clock. When every message older than this has been read, those
                of the jobs returned are lost.
            limit: How many at most.

        Returns:
            What has to be sent again.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"moment": moment, "limit": limit}
        async with self._database.connection() as connection:
            return await addresses(_SENT_BEFORE, values, connection)

    async def expired_leases(
        self, *, limit: int, max_crashes: int = MAX_CRASHES
    ) -> list[JobAddress]:
        """Put jobs back in the queue whose holder has not kept its lease.

        They lose no attempt, and one more crash is counted. Those that must not run again are
        left for `end_overdue`.

        Args:
            limit: How many at most.
            max_crashes: Deaths of a process after which a job is set aside.

        Returns:
            Those that are queued now, without a message.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"limit": limit, "max_crashes": max_crashes}
        async with self._database.connection() as connection:
            return await addresses(_REQUEUE, values, connection)

    async def end_overdue(self, *, limit: int, max_crashes: int = MAX_CRASHES) -> list[Delivery]:
        """End jobs that nobody will: past their deadline in the queue, or left by a dead worker.

        Args:
            limit: How many at most, of each kind.
            max_crashes: Deaths of a process after which a job is set aside.

        Returns:
            The outcomes, to be published.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "limit": limit,
            "max_crashes": max_crashes,
            "cancelled": CANCELLED.model_dump_json(),
            "expired": DEADLINE_PASSED.model_dump_json(),
            "set_aside": SET_ASIDE.model_dump_json(),
        }
        async with self._database.connection() as connection:
            rows = (await connection.execute(_END, values)).mappings().all()
        return [delivery(row) for row in rows]
