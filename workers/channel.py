"""Result channels and token streams: Redis Streams that producers and pipelines read.

A channel is one stream of one namespace. Delivery is at least once: a repeat carries the same
(job id, token), and a consumer here drops the repeats that it has seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from schema import names
from workers.consumer import ChannelConsumer
from workers.cursors import START, checked_cursor
from workers.streams import (
    Delivery,
    broker_errors,
    deliveries_of,
    entries_of,
    milliseconds,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from uuid import UUID

    from redis.asyncio import Redis

    from schema.jobs import JobResult

# One command for many results: to pack one for each, and to read its reply, took most of the time
# of a publication. Whoever is woken finds the result in the channel, so all are appended first.
_APPEND = """
for at = 5, #ARGV, 5 do
    local entry = {'job_id', ARGV[at], 'token', ARGV[at + 1], 'result', ARGV[at + 2]}
    if ARGV[1] == '0' then
        redis.call('XADD', KEYS[1], '*', unpack(entry))
    else
        redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[1], '*', unpack(entry))
    end
end
if ARGV[2] ~= '0' then
    redis.call('PEXPIRE', KEYS[1], ARGV[2])
end
-- Recovery looks there for consumer groups.
redis.call('ZADD', KEYS[2], ARGV[4], ARGV[3])
for at = 5, #ARGV, 5 do
    redis.call('PUBLISH', ARGV[at + 3], ARGV[at + 4])
end
return redis.call('GET', KEYS[3])
"""

__all__ = ["START", "ChannelConsumer", "Delivery", "ResultChannel", "TokenDelta"]


@dataclass(frozen=True, kw_only=True)
class TokenDelta:
    """A piece of an answer that is still growing."""

    cursor: str  # id of the stream entry: read on from here
    text: str
    index: int = 0  # which of the n answers
    offset: int = 0  # characters of that answer before this piece
    finished: bool = False  # nothing follows this one


class ResultChannel:
    """Publishes results and token deltas, and reads them back.

    Args:
        redis: A client of redis-py's asyncio interface, with ``decode_responses`` off. The caller
            closes it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._append = redis.register_script(_APPEND)

    async def publish(
        self,
        results: Sequence[tuple[str, JobResult]],
        *,
        maxlen: int | None = None,
        ttl_s: float | None = None,
    ) -> str | None:
        """Append results to their channels and wake those who wait for the jobs, in one trip.

        Args:
            results: Pairs of channel and result.
            maxlen: Entries that a channel keeps, approximately; the oldest go. None keeps all.
            ttl_s: Seconds after its last result at which a whole channel is dropped. None: never.

        Returns:
            The epoch that Redis bore when it had taken them; None when it bore none.

        Raises:
            BrokerUnavailableError: Redis failed; some of the results may have been published, and
                publishing all of them again is harmless.
        """
        if not results:
            return None
        streams: dict[str, list[Any]] = {}
        now = time.time()
        for channel, result in results:
            stream = names.results_stream(result.namespace, channel)
            said = streams.get(stream)
            if said is None:
                member = names.channel_member(result.namespace, channel)
                said = streams[stream] = [maxlen or 0, int((ttl_s or 0) * 1000), member, now]
            signal = names.done_signal(result.namespace, result.job_id)
            said += (str(result.job_id), result.token, result.json_text, signal, result.status)
        epochs: list[bytes | None] = []
        with broker_errors("publishing results"):
            for stream, said in streams.items():
                keys = [stream, names.CHANNELS, names.EPOCH]
                epochs.append(await self._append(keys=keys, args=said))
        # Should Redis have lost its data between two of them, the first was lost.
        return None if epochs[0] is None else epochs[0].decode()

    async def end(self, namespace: str, channel: str) -> str:
        """Return the cursor behind the newest entry, to read what comes from now on."""
        with broker_errors("reading a channel"):
            newest: Any = await self._redis.xrevrange(
                names.results_stream(namespace, channel), count=1
            )
        return newest[0][0].decode() if newest else START

    async def trim(self, namespace: str, channel: str, cursor: str) -> None:
        """Drop what stands before an entry, approximately; for a channel with one reader.

        Args:
            namespace: Tenant.
            channel: Name of the channel.
            cursor: The entry.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        stream = names.results_stream(namespace, channel)
        with broker_errors("trimming a channel"):
            await self._redis.xtrim(stream, minid=checked_cursor(cursor), approximate=True)

    async def drop(self, namespace: str, channel: str) -> None:
        """Drop a channel with all that is in it.

        Args:
            namespace: Tenant.
            channel: Name of the channel.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        with broker_errors("dropping a channel"):
            await self._redis.delete(names.results_stream(namespace, channel))

    async def read(
        self,
        namespace: str,
        channel: str,
        cursor: str = START,
        *,
        count: int = 256,
        block_s: float | None = None,
    ) -> list[Delivery]:
        """Read what stands behind a cursor.

        Args:
            namespace: Tenant.
            channel: Name of the channel.
            cursor: Where the last read ended; `START` replays all that is kept.
            count: Most entries returned.
            block_s: Seconds to wait for a first entry; None returns at once.

        Returns:
            The entries in order, possibly none.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        stream = names.results_stream(namespace, channel)
        with broker_errors("reading a channel"):
            replies: Any = await self._redis.xread(
                {stream: checked_cursor(cursor)}, count=count, block=milliseconds(block_s)
            )
        return deliveries_of(entries_of(replies))

    def consume(
        self,
        namespace: str,
        channel: str,
        group: str,
        consumer: str,
        *,
        cursor: str = START,
        count: int = 256,
        stale_s: float = 60.0,
        block_s: float = 1.0,
        on_join: Callable[[], Awaitable[None]] | None = None,
    ) -> ChannelConsumer:
        """Return a member of a consumer group; see `ChannelConsumer`.

        Args:
            namespace: Tenant.
            channel: Name of the channel.
            group: The group; each result goes to one of its members. Created when it is new.
            consumer: This member's name: the same again after a restart, and nobody else's.
            cursor: Where a new group begins; `START` is the oldest entry kept.
            count: Most entries taken at once.
            stale_s: Seconds without acknowledgement after which another member's entry is taken
                over.
            block_s: Seconds of one wait for new entries.
            on_join: Called whenever the group was made or joined.
        """
        return ChannelConsumer(
            redis=self._redis,
            stream=names.results_stream(namespace, channel),
            group=group,
            consumer=consumer,
            cursor=checked_cursor(cursor),
            count=count,
            stale_s=stale_s,
            block_s=block_s,
            on_join=on_join,
        )

    async def append_tokens(
        self,
        namespace: str,
        job_id: UUID,
        deltas: Sequence[tuple[int, int, str]],
        *,
        finished: bool = False,
        ttl_s: float = 600.0,
    ) -> None:
        """Append text to the token stream of a job.

        Args:
            namespace: Tenant.
            job_id: The job.
            deltas: For each piece: index of the answer (0 to n-1), characters of that answer
                before the piece, and its text.
            finished: Close the stream: nothing follows.
            ttl_s: Seconds after which the stream is dropped; the answer is in Postgres then.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        stream = names.tokens_stream(namespace, job_id)
        with broker_errors("publishing tokens"):
            async with self._redis.pipeline(transaction=False) as pipe:
                for index, offset, text in deltas:
                    pipe.xadd(stream, {"i": index, "o": offset, "t": text})
                if finished:
                    pipe.xadd(stream, {"end": 1})
                pipe.pexpire(stream, int(ttl_s * 1000))
                await pipe.execute()

    async def drop_tokens(self, namespace: str, job_id: UUID) -> None:
        """Drop a job's token stream, so that a second run begins an empty one.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        with broker_errors("dropping tokens"):
            # Trimmed and not deleted: ids go on from the last, so that whoever has a cursor of the
            # first run finds the second behind it, were it written in the same millisecond.
            await self._redis.xtrim(
                names.tokens_stream(namespace, job_id), maxlen=0, approximate=False
            )

    async def read_tokens(
        self,
        namespace: str,
        job_id: UUID,
        cursor: str = START,
        *,
        count: int = 256,
        block_s: float | None = None,
    ) -> list[TokenDelta]:
        """Read a job's token stream behind a cursor.

        Args:
            namespace: Tenant.
            job_id: The job.
            cursor: Where the last read ended; `START` begins with the first token.
            count: Most entries returned.
            block_s: Seconds to wait for a first entry; None returns at once.

        Returns:
            The deltas in order; none also when the stream never was or has expired.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        stream = names.tokens_stream(namespace, job_id)
        with broker_errors("reading tokens"):
            replies: Any = await self._redis.xread(
                {stream: checked_cursor(cursor)}, count=count, block=milliseconds(block_s)
            )
        return [_token_delta(at.decode(), fields) for at, fields in entries_of(replies)]


def _token_delta(cursor: str, fields: dict[bytes, bytes]) -> TokenDelta:
    if b"end" in fields:
        return TokenDelta(cursor=cursor, text="", finished=True)
    return TokenDelta(
        cursor=cursor,
        text=fields[b"t"].decode(),
        index=int(fields[b"i"]),
        offset=int(fields[b"o"]),
    )
