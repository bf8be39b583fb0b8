"""A member of a consumer group on a result channel."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Any

from workers.cancellation import heed_cancellation
from workers.cursors import START, checked_cursor
from workers.streams import (
    Delivery,
    Entry,
    broker_errors,
    deliveries_of,
    entries_of,
    milliseconds,
    reply,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from uuid import UUID

    from redis.asyncio import Redis

#: Pairs of (job id, token) that one consumer remembers in order to drop repeats.
REMEMBERED = 65_536


@dataclass(kw_only=True)
class ChannelConsumer:
    """One member of a consumer group: an endless async iterator of results.

    It begins with what this consumer was given before and did not acknowledge, takes over what
    other members left lying, and drops repeats that it has seen. `ack` is explicit: a result that
    is not acknowledged comes again.
    """

    redis: Redis
    stream: str
    group: str
    consumer: str
    cursor: str
    count: int
    stale_s: float
    block_s: float
    #: Called when the group was made or joined, to register it in Postgres.
    on_join: Callable[[], Awaitable[None]] | None = None
    #: Entries that hold an outcome and are not acknowledged; none when the outcome is done with.
    _seen: OrderedDict[tuple[UUID, int], set[str]] = field(default_factory=OrderedDict, repr=False)

    async def __aiter__(self) -> AsyncIterator[Delivery]:
        """Yield results as they come; end it by leaving the loop."""
        await self._create_group()
        own: str | None = START
        while own is not None:
            entries = await self._read_group(own)
            own = entries[-1][0].decode() if entries else None
            for delivery in await self._new(entries):
                yield delivery
        looked_at = monotonic()
        while True:
            heed_cancellation()
            entries = []
            if monotonic() - looked_at >= self.stale_s / 2:
                entries, looked_at = await self._take_over(), monotonic()
            entries = entries or await self._read_group(">")
            for delivery in await self._new(entries):
                yield delivery

    async def ack(self, *deliveries: Delivery) -> None:
        """Say that these are done with; doing so twice is harmless.

        Args:
            deliveries: As yielded.

        Raises:
            BrokerUnavailableError: Redis failed: they will come again.
        """
        keys = [(delivery.result.job_id, delivery.result.token) for delivery in deliveries]
        cursors = {delivery.cursor for delivery in deliveries}
        await self._ack_entries([*cursors.union(*(self._seen.get(key, ()) for key in keys))])
        for key in keys:
            if key in self._seen:
                self._seen[key] = set()

    async def replay(self, cursor: str = START) -> None:
        """Have the group be given again what stands behind a cursor, acknowledged or not.

        Args:
            cursor: Of the last delivery that is not wanted again; `START` is before the oldest
                result kept.

        Raises:
            InvalidRequestError: It is no place in a channel.
            BrokerUnavailableError: Redis failed: the group stands where it stood.
        """
        checked_cursor(cursor)
        await self._create_group()
        with broker_errors("replaying a channel"):
            await self.redis.xgroup_setid(self.stream, self.group, cursor)
        self._seen.clear()

    async def _ack_entries(self, cursors: Sequence[str | bytes]) -> None:
        if cursors:
            untyped: Any = self.redis  # redis-py's xack has no annotations
            with broker_errors("acknowledging results"):
                await untyped.xack(self.stream, self.group, *cursors)

    async def _create_group(self) -> None:
        with broker_errors("joining a consumer group"), reply("BUSYGROUP"):
            await self.redis.xgroup_create(self.stream, self.group, id=self.cursor, mkstream=True)
        if self.on_join is not None:
            await self.on_join()

    async def _read_group(self, cursor: str) -> list[Entry]:
        replies: Any = None
        with broker_errors("reading a channel"), reply("NOGROUP") as missing:
            replies = await self.redis.xreadgroup(
                self.group,
                self.consumer,
                {self.stream: cursor},
                count=self.count,
                block=milliseconds(self.block_s) if cursor == ">" else None,
            )
        if missing.is_set():
            # The stream expired, or Redis lost its data: the group begins anew.
            await self._create_group()
        return entries_of(replies)

    async def _take_over(self) -> list[Entry]:
        replies: Any = ("", (), ())
        with broker_errors("taking over results"), reply("NOGROUP") as missing:
            replies = await self.redis.xautoclaim(
                self.stream,
                self.group,
                self.consumer,
                min_idle_time=int(self.stale_s * 1000),
                start_id=START,
                count=self.count,
            )
        if missing.is_set():
            await self._create_group()
        return [entry for entry in replies[1] if entry]

    async def _new(self, entries: list[Entry]) -> list[Delivery]:
        fresh = []
        readable = deliveries_of(entries)
        # What was trimmed meanwhile, and what is not a result, would be taken over for ever.
        cursors = {delivery.cursor for delivery in readable}
        spent = [cursor for cursor, _ in entries if cursor.decode() not in cursors]
        for delivery in readable:
            key = (delivery.result.job_id, delivery.result.token)
            if (entries_left := self._seen.get(key)) is None:
                self._seen[key] = {delivery.cursor}
                fresh.append(delivery)
            elif entries_left:
                # It is still being worked on here, and not yielded twice. Until it is acknowledged
                # the repeat stays pending too: Redis may have lost the entry that was yielded.
                entries_left.add(delivery.cursor)
            else:
                spent.append(delivery.cursor.encode())
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        await self._ack_entries(spent)
        return fresh
