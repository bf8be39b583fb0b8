"""Deleting what a namespace has in Redis: channels, token streams, messages, dead letters."""

from __future__ import annotations

import base64
import binascii
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import orjson

from schema import names
from workers.stranded import IN_HAND, IN_HAND_INDEX
from workers.streams import broker_errors

if TYPE_CHECKING:
    from datetime import datetime

    from redis.asyncio import Redis

_CHUNK = 500


class RedisErasure:
    """Deletes what a namespace has in Redis.

    Args:
        redis: A client of redis-py's asyncio interface. The caller closes it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis: Any = redis

    async def erase(self, namespace: str) -> Counter[str]:
        """Delete everything of a namespace.

        Args:
            namespace: Tenant.

        Returns:
            What was deleted: keys, or list items, by kind.

        Raises:
            BrokerUnavailableError: Redis failed; what was deleted stays so.
        """
        return await self._each(namespace, delete=True)

    async def remains(self, namespace: str) -> Counter[str]:
        """Count what a namespace has in Redis; as `erase`, which deletes the same.

        Args:
            namespace: Tenant.
        """
        return await self._each(namespace, delete=False)

    async def trim(self, namespace: str, before: datetime) -> int:
        """Delete results that were published before a moment.

        Args:
            namespace: Tenant.
            before: By Redis' clock.

        Returns:
            Entries deleted. Token streams last for minutes, and are left to end by themselves.

        Raises:
            BrokerUnavailableError: Redis failed.
        """
        oldest, trimmed = int(before.timestamp() * 1000), 0
        with broker_errors("trimming channels"):
            async for key in self._redis.scan_iter(
                match=names.results_stream(namespace, "*"), count=1000
            ):
                trimmed += await self._redis.xtrim(key, minid=oldest, approximate=False)
        return trimmed

    async def _each(self, namespace: str, *, delete: bool) -> Counter[str]:
        found: Counter[str] = Counter()
        with broker_errors("deleting what a namespace has"):
            for kind, pattern in _patterns(namespace).items():
                async for key in self._redis.scan_iter(match=pattern, count=1000):
                    found[kind] += await self._redis.unlink(key) if delete else 1
            pattern = names.channel_member(namespace, "*")
            async for member, _ in self._redis.zscan_iter(names.CHANNELS, match=pattern):
                found["names of channels"] += 1
                if delete:
                    await self._redis.zrem(names.CHANNELS, member)
            # Of every model, served now or not.
            async for key in self._redis.scan_iter(
                match=names.queue("*"), count=1000, _type="list"
            ):
                found["messages"] += await self._items(
                    key, lambda item: namespace_of(item) == namespace, delete=delete
                )
            found["dead letters"] += await self._items(
                names.DEAD_LETTERS,
                lambda entry: namespace_of(_buried(entry)) == namespace,
                delete=delete,
            )
            async for tag in self._in_hand(namespace):
                found["messages in hand"] += 1
                if delete:
                    await self._redis.hdel(IN_HAND, tag)
                    await self._redis.zrem(IN_HAND_INDEX, tag)
        return found

    async def _items(self, key: str | bytes, mine: Callable[[bytes], bool], *, delete: bool) -> int:
        found: list[bytes] = []
        start = 0
        while chunk := await self._redis.lrange(key, start, start + _CHUNK - 1):
            found += [item for item in chunk if mine(item)]
            start += len(chunk)
        if not delete:
            return len(found)
        # By value: others push and pop meanwhile, and places move.
        return sum([await self._redis.lrem(key, 1, item) for item in found])

    async def _in_hand(self, namespace: str) -> AsyncIterator[bytes]:
        async for tag, entry in self._redis.hscan_iter(IN_HAND, count=_CHUNK):
            try:
                message = orjson.loads(entry)[0]
            except (ValueError, LookupError, TypeError):
                continue
            if _stated(message) == namespace:
                yield tag


def _patterns(namespace: str) -> dict[str, str]:
    # No name holds a colon or anything that a pattern would take for more than itself.
    return {
        "channels": names.results_stream(namespace, "*"),
        "token streams": f"tokens:{namespace}:*",
    }


def namespace_of(item: bytes) -> str | None:
    """Return the namespace of a queue item, or None when it is none of ours.

    Args:
        item: As it was in the list.
    """
    try:
        return _stated(orjson.loads(item))
    except ValueError:
        return None


def _stated(message: object) -> str | None:
    try:
        stated = message["headers"][names.JOBS_HEADER]["namespace"]  # type: ignore[index]
    except (LookupError, TypeError):
        return None
    return stated if isinstance(stated, str) else None


def _buried(entry: bytes) -> bytes:
    try:
        return base64.b64decode(orjson.loads(entry)["item_base64"])
    except (ValueError, LookupError, TypeError, binascii.Error):
        return b""
