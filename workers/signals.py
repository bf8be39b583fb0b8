"""Waiting for jobs: one Pub/Sub connection wakes all who wait in this process."""

from __future__ import annotations

import asyncio
import contextlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from redis.exceptions import RedisError

from workers.cancellation import end, heed_cancellation

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from redis.asyncio import Redis

# Keeps the connection subscribed while nobody waits; nothing is ever published there.
_KEEP_ALIVE = "promptmill:signals"
_RETRY_S = 1.0
_READ_S = 5.0


class DoneSignals:
    """Wakes waiters when Redis announces what they wait for.

    A signal may be lost: with the connection, or published before the subscription stood. So a
    waiter looks at the truth after subscribing, and again now and then.

    Args:
        redis: A client of redis-py's asyncio interface. The caller closes it.
    """

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._pubsub: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._confirmed: dict[str, asyncio.Event] = {}

    @asynccontextmanager
    async def watch(self, signal: str, *, confirm_s: float = 1.0) -> AsyncIterator[asyncio.Event]:
        """Watch one signal.

        Args:
            signal: Name of the Pub/Sub channel.
            confirm_s: Seconds to wait for Redis to confirm; without it the watch goes on, and the
                waiter's own looks have to do.

        Yields:
            An event that is set when the signal comes; clear it to wait for the next.
        """
        event = asyncio.Event()
        self._waiting.setdefault(signal, set()).add(event)
        try:
            with contextlib.suppress(RedisError, OSError, TimeoutError):
                async with asyncio.timeout(confirm_s):
                    await self._subscribe(signal)
            yield event
        finally:
            events = self._waiting[signal]
            events.discard(event)
            if not events:
                del self._waiting[signal]
                self._confirmed.pop(signal, None)
                with contextlib.suppress(RedisError, OSError):
                    if self._pubsub is not None:
                        await self._pubsub.unsubscribe(signal)

    async def aclose(self) -> None:
        """Stop reading and close the connection; idempotent."""
        reader, self._reader = self._reader, None
        if reader is not None:
            await end(reader)
        pubsub, self._pubsub = self._pubsub, None
        if pubsub is not None:
            with contextlib.suppress(RedisError, OSError):
                await pubsub.aclose()

    async def _subscribe(self, signal: str) -> None:
        async with self._starting:
            if self._reader is None:
                pubsub: Any = self._redis.pubsub()
                await pubsub.subscribe(_KEEP_ALIVE)
                self._pubsub = pubsub
                self._reader = asyncio.create_task(self._read(), name="promptmill done signals")
        confirmed = self._confirmed.get(signal)
        if confirmed is None:
            confirmed = self._confirmed[signal] = asyncio.Event()
            await self._pubsub.subscribe(signal)
        await confirmed.wait()

    async def _read(self) -> None:
        while True:
            heed_cancellation()
            try:
                message = await self._pubsub.get_message(timeout=_READ_S)
            except (RedisError, OSError):
                # The client reconnects and subscribes anew at the next read. What was announced
                # meanwhile is lost, so everybody looks.
                self._wake(*self._waiting)
                await asyncio.sleep(_RETRY_S)
                continue
            if message is None:
                continue
            name = message["channel"].decode()
            if message["type"] == "subscribe":
                if (confirmed := self._confirmed.get(name)) is not None:
                    confirmed.set()
            elif message["type"] == "message":
                self._wake(name)

    def _wake(self, *signals: str) -> None:
        for signal in signals:
            for event in self._waiting.get(signal, ()):
                event.set()
