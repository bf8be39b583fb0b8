"""`DataLoss`: notices that Redis lost its data, and has Postgres make good what was lost.

Redis bears an epoch, a random name in a key of its own, and Postgres knows it. A Redis that was
flushed, or that came back without its data, bears none: it is given a new one, and the two differ.
Then what waits in Postgres gets new messages, and what some consumer group had not acknowledged is
published again. How far each group had read is looked up on Redis every few seconds and noted in
Postgres; what was acknowledged since the last look is delivered twice.

A Redis that was killed, or whose replica took over, may have lost its last moments only. It is
known by its run_id, which every start of a server draws anew. At each look the present moment is
written to Redis; so the one that is found after a restart is that up to which nothing was lost,
for Redis keeps and copies its writes in order. What it was given since then is sent and published
again, under a new epoch.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import structlog

from schema import names
from workers.store.records import GroupPosition, KnownRedis, ResultGroup
from workers.streams import Entry, broker_errors, reply

if TYPE_CHECKING:
    from redis.asyncio import Redis

    from workers.store.jobs import JobStore

_log = structlog.get_logger(__name__)
_MOST_CHANNELS = 500  # looked at in one go; of more, a random choice each time

# In one step, for the server may be restarted between two.
_LOOK = """
redis.call('SET', KEYS[1], ARGV[1], 'NX')
local info = redis.pcall('INFO', 'server')
local server = type(info) == 'string' and string.match(info, 'run_id:(%w+)') or ''
if server ~= '' and server == ARGV[2] then
    redis.call('SET', KEYS[2], ARGV[3])
end
return {redis.call('GET', KEYS[1]), server, redis.call('GET', KEYS[2])}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What Redis bears."""

    epoch: str
    server: str | None  # its run_id; what was known before when it does not say so
    moment: datetime | None  # until when it has all that it was given
    restarted: bool = False  # with its data, the last moments perhaps excepted


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
        """Have what was lost sent and published again, if Redis may have lost something.

        Returns:
            How many outcomes are to be published again.

        Raises:
            ServiceError: Postgres or Redis cannot be used now.
        """
        known = await self._jobs.known_redis()
        seen = await self._look(known)
        if known.epoch is None or known.server is None:
            known = await self._jobs.meet(seen.epoch, seen.server)
        if known.epoch != seen.epoch:
            return await self._make_good(seen)
        if known.server != seen.server:
            return await self._make_good(await self._begin_epoch(seen))
        return 0

    async def _look(self, known: KnownRedis) -> _Seen:
        """See what Redis bears, and note the moment on it if it is the server that it was."""
        values = (uuid4().hex, known.server or "", known.moment.isoformat())
        with broker_errors("asking for its epoch"):
            epoch, server, moment = await self._redis.eval(
                _LOOK, 2, names.EPOCH, names.MOMENT, *values
            )
        return _Seen(
            epoch=epoch.decode(),
            server=server.decode() or known.server,
            moment=datetime.fromisoformat(moment.decode()) if moment else None,
        )

    async def _begin_epoch(self, seen: _Seen) -> _Seen:
        # On Redis first: until Postgres knows of it too, nothing counts as published.
        epoch = uuid4().hex
        with broker_errors("beginning an epoch"):
            await self._redis.set(names.EPOCH, epoch)
        return replace(seen, epoch=epoch, restarted=True)

    async def _make_good(self, seen: _Seen) -> int:
        self._noted.clear()
        since = seen.moment if seen.restarted else None
        again = await self._jobs.enter_epoch(
            seen.epoch, server=seen.server, since=since, keep_s=self._keep_s
        )
        if since is None:
            _log.warning("Redis has lost its data; what was lost is sent again", results=again)
        else:
            _log.warning(
                "Redis was restarted; what it was given last is sent again, lest it was lost",
                since=since.isoformat(),
                results=again,
            )
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
        known = await self._jobs.known_redis()
        with broker_errors("looking at consumer groups"):
            moved = {
                group: state
                for group, state in (await self._states()).items()
                if self._noted.get(group) != state
            }
            found = {group: await self._position(group, *state) for group, state in moved.items()}
        sure = {group: position for group, position in found.items() if position is not None}
        # A Redis that lost its data meanwhile shows groups that have read all of the little it has.
        if sure and await self._is_same(known):
            await self._jobs.note_positions(list(sure.values()), known.moment)
            self._noted |= {group: moved[group] for group in sure}

    async def _is_same(self, known: KnownRedis) -> bool:
        seen = await self._look(known)
        return (seen.epoch, seen.server) == (known.epoch, known.server)

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
