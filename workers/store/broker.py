"""What Postgres knows of Redis: the epoch of its data, and how far consumer groups have read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from workers.store.part import StorePart
from workers.store.records import ResultGroup

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from workers.store.records import GroupPosition

_EPOCH = text("SELECT epoch FROM broker")

_FIRST_EPOCH = text("INSERT INTO broker (epoch) VALUES (:epoch) ON CONFLICT DO NOTHING")

# Another transaction that marks them waits for the epoch to be entered, and then finds its own old.
_NEW_EPOCH = text("UPDATE broker SET epoch = :epoch, since = now() WHERE epoch <> :epoch")

# A backlog of millions may have to be written.
_TAKE_LONG = text("SET LOCAL statement_timeout = '600s'")

_UNSEND = text(
    """
    WITH waiting AS (
        SELECT id FROM jobs WHERE state = 'queued' AND sent_at IS NOT NULL
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET sent_at = NULL FROM waiting WHERE jobs.id = waiting.id
    """
)

_UNPUBLISH = text(
    """
    WITH unread AS (
        SELECT id FROM jobs
        WHERE published_at > now() - make_interval(secs => :keep_s) AND finished_at IS NOT NULL
          AND EXISTS (
              SELECT FROM result_groups AS readers
              WHERE readers.namespace = jobs.namespace AND readers.channel = jobs.channel
                AND jobs.published_at > coalesce(readers.acknowledged_to, '-infinity')
          )
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET published_at = NULL FROM unread WHERE jobs.id = unread.id
    """
)

_GROUPS = text("SELECT namespace, channel, name FROM result_groups")

_REGISTER = text(
    """
    INSERT INTO result_groups (namespace, channel, name) VALUES (:namespace, :channel, :name)
    ON CONFLICT DO NOTHING
    """
)

# All that was marked as published before the oldest unread outcome was even committed stands before
# it on the channel, so it was read. An entry of a run that was done over says nothing.
_NOTE = text(
    """
    INSERT INTO result_groups AS known (namespace, channel, name, acknowledged_to)
    SELECT position.namespace, position.channel, position.name,
           CASE WHEN position.job_id IS NULL THEN CAST(:moment AS timestamptz)
                ELSE jobs.finished_at END
    FROM unnest(
        CAST(:namespaces AS text[]), CAST(:channels AS text[]), CAST(:names AS text[]),
        CAST(:job_ids AS uuid[]), CAST(:tokens AS bigint[])
    ) AS position (namespace, channel, name, job_id, token)
         LEFT JOIN jobs ON jobs.id = position.job_id AND jobs.token = position.token
                       AND jobs.namespace = position.namespace
    ORDER BY 1, 2, 3
    ON CONFLICT (namespace, channel, name) DO UPDATE
    SET acknowledged_to = greatest(known.acknowledged_to, excluded.acknowledged_to)
    """
)


class Broker(StorePart):
    """Keeps what is needed to make good a loss of Redis' data."""

    async def now(self) -> datetime:
        """Return the present moment by Postgres' clock.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            moment: datetime = await connection.scalar(text("SELECT now()"))
        return moment

    async def epoch(self, redis_epoch: str) -> str:
        """Return the epoch that Postgres is in; the very first one is taken from Redis.

        Args:
            redis_epoch: What Redis bears.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            known: str | None = await connection.scalar(_EPOCH)
            if known is None:
                await connection.execute(_FIRST_EPOCH, {"epoch": redis_epoch})
                known = await connection.scalar(_EPOCH)
        return known or redis_epoch

    async def enter_epoch(self, redis_epoch: str, *, keep_s: float) -> int:
        """Take note that Redis began anew, without the messages and results that it had.

        Every queued job counts as not sent from then on, and every outcome that some registered
        group has not acknowledged, as far as is known, as not published.

        Args:
            redis_epoch: What Redis bears now.
            keep_s: Seconds that a channel keeps results; older ones would be gone anyway.

        Returns:
            How many outcomes are to be published again.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now; nothing was changed.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_TAKE_LONG)
            await connection.execute(_NEW_EPOCH, {"epoch": redis_epoch})
            await connection.execute(_UNSEND)
            again = await connection.execute(_UNPUBLISH, {"keep_s": keep_s})
        return again.rowcount

    async def result_groups(self) -> list[ResultGroup]:
        """Return every registered consumer group, of all namespaces.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            rows = (await connection.execute(_GROUPS)).all()
        return [
            ResultGroup(namespace=row.namespace, channel=row.channel, name=row.name) for row in rows
        ]

    async def register_group(self, group: ResultGroup) -> None:
        """Register a consumer group: what it has not read survives a loss of Redis' data.

        Args:
            group: As it is called on Redis.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {"namespace": group.namespace, "channel": group.channel, "name": group.name}
        async with self._database.connection() as connection:
            await connection.execute(_REGISTER, values)

    async def note_positions(self, positions: Sequence[GroupPosition], moment: datetime) -> None:
        """Note how far groups have read; those not known yet are registered.

        Args:
            positions: As seen on Redis.
            moment: From `now`, taken before Redis was looked at.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        values = {
            "moment": moment,
            "namespaces": [each.group.namespace for each in positions],
            "channels": [each.group.channel for each in positions],
            "names": [each.group.name for each in positions],
            "job_ids": [each.unread_job for each in positions],
            "tokens": [each.unread_token for each in positions],
        }
        async with self._database.connection() as connection:
            await connection.execute(_NOTE, values)
