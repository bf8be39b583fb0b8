"""What Postgres knows of Redis: the epoch of its data, and how far consumer groups have read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import text

from workers.store.part import StorePart
from workers.store.records import KnownRedis, ResultGroup

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from workers.store.records import GroupPosition

_KNOWN = text(
    """
    SELECT epoch, server, now() AS moment
    FROM (VALUES (1)) AS one (id) LEFT JOIN broker ON broker.id = one.id
    """
)

_MEET = text(
    """
    INSERT INTO broker (epoch, server) VALUES (:epoch, CAST(:server AS text))
    ON CONFLICT (id) DO UPDATE SET server = coalesce(broker.server, excluded.server)
    RETURNING epoch, server, now() AS moment
    """
)

# Another transaction that marks them waits for the epoch to be entered, and then finds its own old.
_NEW_EPOCH = text(
    """
    UPDATE broker SET epoch = :epoch, server = CAST(:server AS text), since = now()
    WHERE epoch <> :epoch
    """
)

# A backlog of millions may have to be written.
_TAKE_LONG = text("SET LOCAL statement_timeout = '600s'")

# A row says that it was sent a moment before its message is written.
_UNSEND = text(
    """
    WITH waiting AS (
        SELECT id FROM jobs
        WHERE state = 'queued' AND sent_at IS NOT NULL
          AND sent_at > coalesce(CAST(:since AS timestamptz) - interval '1 minute', '-infinity')
        ORDER BY id
        FOR NO KEY UPDATE
    )
    UPDATE jobs SET sent_at = NULL FROM waiting WHERE jobs.id = waiting.id
    """
)

# Where everything is gone, what nobody reads in a group is not written again: who looks at such a
# channel comes by and by, and Postgres has it. Of the last moments it is little.
_UNPUBLISH = text(
    """
    WITH unread AS (
        SELECT id FROM jobs
        WHERE published_at > greatest(now() - make_interval(secs => :keep_s),
                                      CAST(:since AS timestamptz))
          AND finished_at IS NOT NULL
          AND (EXISTS (
              SELECT FROM result_groups AS readers
              WHERE readers.namespace = jobs.namespace AND readers.channel = jobs.channel
                AND jobs.published_at > coalesce(readers.acknowledged_to, '-infinity')
          ) OR CAST(:since AS timestamptz) IS NOT NULL AND NOT EXISTS (
              SELECT FROM result_groups AS readers
              WHERE readers.namespace = jobs.namespace AND readers.channel = jobs.channel
          ))
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

    async def known_redis(self) -> KnownRedis:
        """Return what is known of Redis, and the present moment by Postgres' clock.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            row = (await connection.execute(_KNOWN)).one()
        return KnownRedis(epoch=row.epoch, server=row.server, moment=row.moment)

    async def meet(self, epoch: str, server: str | None = None) -> KnownRedis:
        """Note what Redis bears, where nothing is known yet.

        Args:
            epoch: Of its data.
            server: Its run_id, if it says so.

        Returns:
            What is known now.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now.
        """
        async with self._database.connection() as connection:
            row = (await connection.execute(_MEET, {"epoch": epoch, "server": server})).one()
        return KnownRedis(epoch=row.epoch, server=row.server, moment=row.moment)

    async def enter_epoch(
        self, epoch: str, *, server: str | None, since: datetime | None, keep_s: float
    ) -> int:
        """Take note that Redis is without messages and results that it had.

        Every queued job whose message may be lost counts as not sent from then on; and as not
        published every such outcome that some registered group has not acknowledged, as far as is
        known.

        Args:
            epoch: What Redis bears now.
            server: Its run_id, if it says so.
            since: What it was given until then it has; None when it has lost everything.
            keep_s: Seconds that a channel keeps results; older ones would be gone anyway.

        Returns:
            How many outcomes are to be published again.

        Raises:
            DatabaseUnavailableError: Postgres cannot be used now; nothing was changed.
        """
        async with self._database.transaction() as connection:
            await connection.execute(_TAKE_LONG)
            await connection.execute(_NEW_EPOCH, {"epoch": epoch, "server": server})
            await connection.execute(_UNSEND, {"since": since})
            again = await connection.execute(_UNPUBLISH, {"keep_s": keep_s, "since": since})
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
            moment: From `known_redis`, taken before Redis was looked at.

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
