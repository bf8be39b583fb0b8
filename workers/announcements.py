"""What is announced to all workers at once: cancelled jobs, and answers to be forgotten.

Announcements hurry, they do not decide: Postgres holds the truth, and one that is missed is seen
with the next heartbeat or look-up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import orjson
import structlog
from redis.exceptions import RedisError

from schema import names
from workers.cancellation import end, heed_cancellation

if TYPE_CHECKING:
    from redis.asyncio import Redis

_log = structlog.get_logger(__name__)
_RETRY_S = 0.5
_READ_S = 5.0

#: Takes the parsed JSON object of one announcement.
Listener = Callable[[dict[str, Any]], None]


class Announcements:
    """Listens on Pub/Sub channels.

    Args:
        redis: A client of redis-py's asyncio interface. The caller closes it.
        listeners: What to do with an announcement, by channel.
        missed: Called whenever announcements may have been missed: after each reconnection.
    """

    def __init__(
        self, redis: Redis, listeners: Mapping[str, Listener], *, missed: Callable[[], None]
    ) -> None:
        self._redis = redis
        self._listeners = dict(listeners)
        self._missed = missed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to listen; idempotent."""
        if self._task is None:
            self._task = asyncio.create_task(self._listen(), name="promptmill-announcements")

    async def aclose(self) -> None:
        """Stop listening; idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def _listen(self) -> None:
        while True:
            heed_cancellation()
            pubsub: Any = self._redis.pubsub()
            try:
                await pubsub.subscribe(*self._listeners)
                self._missed()
                while True:
                    heed_cancellation()
                    message = await pubsub.get_message(
                        ignore_subscribe_messages=True, timeout=_READ_S
                    )
                    if message is not None:
                        self._hear(message["channel"].decode(), message["data"])
            except (RedisError, OSError) as exc:
                _log.warning("announcements interrupted", reason=str(exc) or type(exc).__name__)
                await asyncio.sleep(_RETRY_S)
            finally:
                with contextlib.suppress(RedisError, OSError):
                    await pubsub.aclose()

    def _hear(self, channel: str, data: bytes) -> None:
        try:
            said = orjson.loads(data)
            if said.get("v") == names.WIRE_VERSION:
                self._listeners[channel](said)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            # Foreign or broken: nothing that anybody could say here may stop a worker.
            _log.warning("announcement not understood", channel=channel, reason=str(exc))
