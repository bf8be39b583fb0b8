"""`DataLoss`: notices that Redis lost its data, and has Postgres make good what was lost.

Redis bears an epoch, a random name in a key of its own, and Postgres knows it. A Redis that was
flushed, or that came back without its data, bears none: it is given a new one, and the two differ.
Then what waits in Postgres gets new messages, and what some consumer group had not acknowledged is
published again. How far each group had read is looked up on Redis every few seconds and noted in
Postgres; what was acknowledged since the last look is delivered twice.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import structlog

from schema import names
from workers.store.records import GroupPosition, ResultGroup
from workers.streams import Entry, broker_errors, reply

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.store.jobs import JobStore

_log = structlog.get_logger(__name__)
_MOST_CHANNELS = 500  # looked at in one go; of more, a random choice each time


class DataLoss:
    """Compares the epochs, and keeps account of what groups have read.

    Args:
        redis: A client of redis-py's asyncio interface.
        jobs: The job store.
        keep_s: Seconds that a channel keeps results.
    """

    def __init__(self, redis: Redis, jobs: JobStore, *, keep_s: float) -> None:
        self._redis: Any = redis  # parts of redis-py have no annotations
        self._jobs = jobs
        self._keep_s = keep_s
        self._noted: dict[ResultGroup, tuple[str, int]] = {}  # as they stood at the last look

    async def heed(self) -> int:
        """Have what was lost sent and published again, if Redis has lost its data.

        Returns:
            How many outcomes are to be published again.

        Raises:
            ServiceError: Postgres or Redis cannot be used now.
        """
        with broker_errors("asking for its epoch"):
            await self._redis.set(names.EPOCH, uuid4().hex, nx=True)
            borne = (await self._redis.get(names.EPOCH)).decode()
        if await self._jobs.epoch(borne) == borne:
            return 0
        self._noted.clear()
        again = await self._jobs.enter_epoch(borne, keep_s=self._keep_s)
        _log.warning("Redis has lost its data; what was lost is sent again", results=again)
        for group in await self._jobs.result_groups():
            # Before anything is published: a member that comes back later must find it all.
            with broker_errors("making a consumer group again"), reply("BUSYGROUP"):
                await self._redis.xgroup_create(
                    names.results_stream(group.namespace, group.channel),
                    group.name,
                    id="0",
                    mkstream=True,
                )
        return again

    async def note_positions(self) -> None:
        """Look up how far groups have read, and note what has changed.

        Raises:
            ServiceError: Postgres or Redis cannot be used now.
        """
        moment = await self._jobs.now()
        with broker_errors("looking at consumer groups"):
            moved = {
                group: state
                for group, state in (await self._states()).items()
                if self._noted.get(group) != state
            }
            found = {group: await self._position(group, *state) for group, state in moved.items()}
        known = {group: position for group, position in found.items() if position is not None}
        if known:
            await self._jobs.note_positions(list(known.values()), moment)
            self._noted |= {group: moved[group] for group in known}

    async def _channels(self) -> list[tuple[str, str]]:
        await self._redis.zremrangebyscore(names.CHANNELS, "-inf", time.time() - self._keep_s)
        members = await self._redis.zrandmember(names.CHANNELS, _MOST_CHANNELS)
        pairs = (member.decode().partition(":") for member in members)
        return [(namespace, channel) for namespace, _, channel in pairs]

    async def _states(self) -> dict[ResultGroup, tuple[str, int]]:
        """Return of every group the last entry given out, and how many are not acknowledged."""
        channels = await self._channels()
        async with self._redis.pipeline(transaction=False) as pipe:
            for place in channels:
                pipe.xinfo_groups(names.results_stream(*place))
            replies = await pipe.execute(raise_on_error=False)
        states = {}
        for (namespace, channel), groups in zip(channels, replies, strict=True):
            if isinstance(groups, Exception):
                continue  # the channel expired
            for group in groups:
                key = ResultGroup(namespace=namespace, channel=channel, name=group["name"].decode())
                states[key] = (group["last-delivered-id"].decode(), int(group["pending"]))
        return states

    async def _position(
        self, group: ResultGroup, delivered: str, pending: int
    ) -> GroupPosition | None:
        """Return the oldest entry that a group has not acknowledged, or None if unknown."""
        stream = names.results_stream(group.namespace, group.channel)
        with reply("NOGROUP"):
            if not pending:
                unread = await self._redis.xrange(stream, min=f"({delivered}", count=1)
                return _position(group, unread)
            first = await self._redis.xpending_range(stream, group.name, "-", "+", 1)
            if first:
                at = first[0]["message_id"]
                unread = await self._redis.xrange(stream, min=at, max=at)
                # One that was trimmed away says nothing.
                return _position(group, unread) if unread else None
        return None  # acknowledged, or gone, meanwhile: the next look will tell


def _position(group: ResultGroup, unread: list[Entry]) -> GroupPosition:
    if not unread:
        return GroupPosition(group=group)
    fields = unread[0][1]
    try:
        job_id, token = UUID(fields[b"job_id"].decode()), int(fields[b"token"])
    except (KeyError, ValueError):
        job_id, token = UUID(int=0), 0  # not one of ours: no job is found by it
    return GroupPosition(group=group, unread_job=job_id, unread_token=token)
